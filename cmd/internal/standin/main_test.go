package standin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
)

func TestMain(m *testing.M) { netnstest.MainLeaks(m) }

var (
	pod4, pod6   = netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd01::2")
	node4, node6 = netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd01::1")
	far4, far6   = netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8::1")

	app, app6     = netip.AddrPortFrom(pod4, 8080), netip.AddrPortFrom(pod6, 8080)
	probe, probe6 = netip.AddrPortFrom(node4, 40000), netip.AddrPortFrom(node6, 40000)
)

func workload() zds.Workload {
	return zds.Workload{UID: "u", Name: "pod", Namespace: "ns", Device: &zds.Device{
		MTU: 1500, Offload: true, Addresses: []netip.Addr{pod4, pod6}, NodeAddresses: []netip.Addr{node4, node6},
	}}
}

// segment makes a TCP packet with right checksums.
func segment(src, dst netip.AddrPort, flags byte, payload string) []byte {
	h := make([]byte, tcpHeader, tcpHeader+len(payload))
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	h[12], h[13] = 5<<4, flags
	binary.BigEndian.PutUint16(h[14:], 64000)
	h = append(h, payload...)
	pseudo := append(append([]byte{}, src.Addr().AsSlice()...), dst.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, protoTCP, byte(len(h)>>8), byte(len(h)))
	binary.BigEndian.PutUint16(h[16:], ^onesSum(append(pseudo, h...)))
	if src.Addr().Is6() {
		ip := make([]byte, ipv6Header)
		ip[0], ip[6], ip[7] = 6<<4, protoTCP, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(len(h)))
		copy(ip[8:], src.Addr().AsSlice())
		copy(ip[24:], dst.Addr().AsSlice())
		return append(ip, h...)
	}
	ip := make([]byte, ipv4Header)
	ip[0], ip[8], ip[9] = 0x45, 64, protoTCP
	binary.BigEndian.PutUint16(ip[2:], uint16(ipv4Header+len(h)))
	copy(ip[12:], src.Addr().AsSlice())
	copy(ip[16:], dst.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], ^onesSum(ip))
	return append(ip, h...)
}

func onesSum(b []byte) uint16 {
	if len(b)%2 == 1 {
		b = append(b[:len(b):len(b)], 0)
	}
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// wire is a device whose other end the test holds.
type wire struct {
	t      *testing.T
	dev    *tun.Device
	vector tun.Vector
	buf    []byte
}

// newWire returns the test's end, and the file of the other.
func newWire(t *testing.T) (*wire, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := tun.New(os.NewFile(uintptr(fds[0]), "test's end"), tun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Close() })
	w := &wire{t: t, dev: dev, buf: make([]byte, tun.MaxPacket)}
	w.vector.Set(0, w.buf)
	return w, os.NewFile(uintptr(fds[1]), "device")
}

func (w *wire) send(h tun.Header, b []byte) {
	w.t.Helper()
	if err := w.dev.Write(h, b); err != nil {
		w.t.Fatal(err)
	}
}

// next waits for a packet.
func (w *wire) next() (b []byte, h tun.Header) {
	w.t.Helper()
	netnstest.Eventually(w.t, "a packet", func() bool {
		n, header, err := w.dev.Read(&w.vector)
		if errors.Is(err, tun.ErrEmpty) {
			return false
		}
		if err != nil {
			w.t.Fatal(err)
		}
		b, h = w.buf[:n], header
		return true
	})
	return b, h
}

// passes sends a packet that has to come back as it is.
func (w *wire) passes(b []byte) {
	w.t.Helper()
	w.send(tun.Header{}, b)
	if got, h := w.next(); !bytes.Equal(got, b) || h != (tun.Header{}) {
		w.t.Fatalf("% x came back as % x with %+v", b, got, h)
	}
}

// asker answers isProbe as the test says.
type asker struct {
	mu    sync.Mutex
	yes   bool
	asked []key
}

func (a *asker) isProbe(src, dst netip.AddrPort) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked = append(a.asked, key{src, dst})
	return a.yes
}

func (a *asker) say(yes bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.yes = yes
}

func newStandin(t *testing.T, isProbe func(src, dst netip.AddrPort) bool) *Standin {
	t.Helper()
	s := New(isProbe, nil)
	t.Cleanup(s.Close)
	return s
}

// dropped sends a packet that has to be dropped, and waits for that.
func (w *wire) dropped(s *Standin, why string, h tun.Header, b []byte) {
	w.t.Helper()
	before := s.Stats()
	w.send(h, b)
	netnstest.Eventually(w.t, why+" is dropped", func() bool { return s.Stats().Dropped > before.Dropped })
	if got := s.Stats(); got.Forwarded != before.Forwarded {
		w.t.Fatalf("%s was forwarded", why)
	}
}
