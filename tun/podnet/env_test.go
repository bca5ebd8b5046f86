package podnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { netnstest.MainLeaks(m) }

// Addresses of every test. The peer is the pod's only neighbour and its way to everything else.
var (
	podAddr  = map[int]netip.Addr{4: netip.MustParseAddr("10.1.0.2"), 6: netip.MustParseAddr("fd01::2")}
	peerAddr = map[int]netip.Addr{4: netip.MustParseAddr("10.1.0.1"), 6: netip.MustParseAddr("fd01::1")}
	farAddr  = map[int]netip.Addr{4: netip.MustParseAddr("198.51.100.1"), 6: netip.MustParseAddr("2001:db8::1")}
)

var bothFamilies = []int{4, 6}

// env is a pod and what is at the other end of its wire.
type env struct {
	t         *testing.T
	pod, peer *netnstest.NS
	vm        *netnstest.NS // behind a bridge of the pod, if virtualMachine was called
	wire      *netnstest.Capture
	a         *Attachment
	dev       *device
	marks     uint16
}

// newEnv joins a pod's eth0 to a peer's p0. Nothing is attached yet.
func newEnv(t *testing.T) *env {
	t.Helper()
	e := &env{t: t, pod: netnstest.New(t, "pod"), peer: netnstest.New(t, "peer")}
	netnstest.Veth(t, e.pod, "eth0", e.peer, "p0")
	for _, ns := range []*netnstest.NS{e.pod, e.peer} {
		ns.SetSysctl("net/ipv4/ip_forward", "0")
		ns.SetSysctl("net/ipv4/conf/all/rp_filter", "0")
	}
	e.pod.SetSysctl("net/ipv4/conf/eth0/rp_filter", "0")
	e.pod.Addr("eth0", "10.1.0.2/24", "fd01::2/64")
	e.peer.Addr("p0", "10.1.0.1/24", "fd01::1/64")
	e.peer.Addr("lo", "198.51.100.1/32", "2001:db8::1/128")
	e.pod.Route("0.0.0.0/0", "10.1.0.1", "eth0")
	e.pod.Route("::/0", "fd01::1", "eth0")
	e.wire = e.peer.Capture("p0")
	// Neighbours are known, so that a test's packet is never delayed by asking for them.
	e.neighbours()
	e.pod.Settled()
	e.peer.Settled()
	return e
}

func (e *env) neighbours() {
	for _, v := range bothFamilies {
		e.neighbour(e.pod, "eth0", peerAddr[v], e.peer.Link("p0"))
		e.neighbour(e.peer, "p0", podAddr[v], e.pod.Link("eth0"))
	}
}

func (e *env) neighbour(ns *netnstest.NS, link string, ip netip.Addr, at netlink.Link) {
	e.t.Helper()
	n := &netlink.Neigh{
		LinkIndex: ns.Link(link).Attrs().Index, State: unix.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: at.Attrs().HardwareAddr,
	}
	if err := ns.Netlink().NeighSet(n); err != nil {
		e.t.Fatal(err)
	}
}

// attach captures the pod and reads its device until the end of the test.
func (e *env) attach(cfg Config) {
	e.t.Helper()
	a, err := Attach(e.t.Context(), e.pod.File(), cfg, nil)
	if err != nil {
		e.t.Fatal(err)
	}
	e.own(a)
}

func (e *env) own(a *Attachment) {
	e.a = a
	e.t.Cleanup(func() { _ = a.Close() })
	if a.File != nil {
		e.dev = readDevice(e.t, a.File)
	}
}

func (e *env) repair() {
	e.t.Helper()
	e.a.repair(e.t.Context())
	if err := e.a.Verify(e.t.Context()); err != nil {
		e.t.Fatalf("after repair: %v", allOf(err))
	}
}

func allOf(err error) error {
	var d *DriftError
	if errors.As(err, &d) {
		return errors.New(strings.Join(d.Differences, "\n"))
	}
	return err
}

// removeRules deletes every rule of a priority, behind the Attachment's back.
func (e *env) removeRules(prios ...uint32) {
	e.t.Helper()
	k := e.a.kernel
	n := 0
	for _, family := range k.families() {
		rules, err := k.rules(e.t.Context(), family)
		if err != nil {
			e.t.Fatal(err)
		}
		for _, r := range rules {
			for _, p := range prios {
				if r.Priority == p {
					n++
					if err := k.deleteRule(e.t.Context(), r); err != nil {
						e.t.Fatal(err)
					}
				}
			}
		}
	}
	if n == 0 {
		e.t.Fatalf("there is no rule %v", prios)
	}
}

// flush empties a table.
func (e *env) flush(table uint32) {
	e.t.Helper()
	k := e.a.kernel
	for _, family := range k.families() {
		routes, err := k.routes(e.t.Context(), family, func(t uint32) bool { return t == table })
		if err != nil {
			e.t.Fatal(err)
		}
		for _, r := range routes {
			if err := k.deleteRoute(e.t.Context(), r); err != nil {
				e.t.Fatal(err)
			}
		}
	}
}

// inSegs counts the TCP segments that the pod's kernel took for itself.
func (e *env) inSegs() int {
	e.t.Helper()
	var text []byte
	e.pod.Do(func() { text, _ = os.ReadFile("/proc/thread-self/net/snmp") })
	var names []string
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i, name := range names {
			if name == "InSegs" {
				n, err := strconv.Atoi(f[i])
				if err != nil {
					e.t.Fatal(err)
				}
				return n
			}
		}
	}
	e.t.Fatal("no Tcp InSegs in net/snmp")
	return 0
}

// connect sends a SYN from a namespace and returns what connect(2) says at once. The socket stays open.
func (e *env) connect(ns *netnstest.NS, to netip.AddrPort, options ...func(fd int) error) (err error) {
	e.t.Helper()
	fd := e.socket(ns, to.Addr(), unix.SOCK_STREAM, options...)
	err = unix.Connect(fd, sockaddr(ns, to))
	if errors.Is(err, unix.EINPROGRESS) {
		return nil
	}
	return err
}

// sendUDP sends one datagram from a namespace.
func (e *env) sendUDP(ns *netnstest.NS, to netip.AddrPort, options ...func(fd int) error) error {
	e.t.Helper()
	fd := e.socket(ns, to.Addr(), unix.SOCK_DGRAM, options...)
	return unix.Sendto(fd, []byte("datagram"), 0, sockaddr(ns, to))
}

func (e *env) socket(ns *netnstest.NS, to netip.Addr, kind int, options ...func(fd int) error) (fd int) {
	e.t.Helper()
	domain := unix.AF_INET
	if to.Is6() {
		domain = unix.AF_INET6
	}
	var err error
	ns.Do(func() {
		if fd, err = unix.Socket(domain, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		for _, o := range options {
			if err = o(fd); err != nil {
				return
			}
		}
	})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func bindToDevice(name string) func(fd int) error {
	return func(fd int) error { return unix.BindToDevice(fd, name) }
}

func sockaddr(ns *netnstest.NS, to netip.AddrPort) unix.Sockaddr {
	if to.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	sa := &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if z := to.Addr().Zone(); z != "" {
		sa.ZoneId = uint32(ns.Link(z).Attrs().Index)
	}
	return sa
}

// settle returns when every packet sent so far has arrived where it will: one that is known to arrive on the wire, each way,
// and at the device, came after it.
func (e *env) settle() {
	e.t.Helper()
	e.marks++
	port := 20000 + e.marks
	isMark := func(dst netip.Addr) func(p []byte) bool {
		return func(b []byte) bool {
			p, ok := parsePacket(b)
			return ok && p.proto == unix.IPPROTO_UDP && p.dst == netip.AddrPortFrom(dst, port)
		}
	}
	if err := e.sendUDP(e.pod, netip.AddrPortFrom(peerAddr[4], port), bindToDevice("eth0")); err != nil {
		e.t.Fatal(err)
	}
	e.wire.Wait(e.t, "mark from the pod", isMark(peerAddr[4]))
	if err := e.sendUDP(e.peer, netip.AddrPortFrom(podAddr[4], port)); err != nil {
		e.t.Fatal(err)
	}
	e.wire.Wait(e.t, "mark to the pod", isMark(podAddr[4]))
	if e.dev != nil && e.dev.alive() {
		mark := netip.MustParseAddr("192.0.2.99")
		if err := e.sendUDP(e.pod, netip.AddrPortFrom(mark, port), bindToDevice("ztun0")); err == nil {
			netnstest.Eventually(e.t, "mark at the device", func() bool { return len(e.dev.matching(isMark(mark))) > 0 })
		}
	}
}

// onWire and onDevice count packets to an address and port, of any transport.
func (e *env) onWire(to netip.AddrPort) int {
	e.t.Helper()
	e.settle()
	return len(e.wire.Packets(packetTo(to)))
}

func (e *env) onDevice(to netip.AddrPort) int {
	e.t.Helper()
	e.settle()
	if e.dev == nil {
		return 0
	}
	return len(e.dev.matching(packetTo(to)))
}

func packetTo(to netip.AddrPort) func(b []byte) bool {
	return func(b []byte) bool {
		p, ok := parsePacket(b)
		return ok && p.dst == netip.AddrPortFrom(to.Addr().WithZone(""), to.Port())
	}
}

// fromPeer puts a packet on the wire to the pod as it is.
func (e *env) fromPeer(b []byte) {
	e.t.Helper()
	e.send(e.peer, "p0", e.pod.Link("eth0"), b)
}

// send puts a packet on a link, to the hardware address of another.
func (e *env) send(ns *netnstest.NS, link string, to netlink.Link, b []byte) {
	e.t.Helper()
	proto := uint16(unix.ETH_P_IP)
	if b[0]>>4 == 6 {
		proto = unix.ETH_P_IPV6
	}
	sa := &unix.SockaddrLinklayer{
		Protocol: binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, proto)), Ifindex: ns.Link(link).Attrs().Index, Halen: 6,
	}
	copy(sa.Addr[:], to.Attrs().HardwareAddr)
	ns.Do(func() {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Sendto(fd, b, 0, sa)
			_ = unix.Close(fd)
		}
		if err != nil {
			e.t.Fatal(err)
		}
	})
}

// device is the reader of a TUN in tests: it keeps what it reads and answers nothing.
type device struct {
	file *os.File
	stop int // eventfd
	done chan struct{}

	// mu guards the fields below.
	mu      sync.Mutex
	packets [][]byte
	dead    bool
	forward func(b []byte) bool
}

// setForward lets the reader give back, as they are, packets that match.
func (d *device) setForward(match func(b []byte) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forward = match
}

const virtioHeader = 10

func readDevice(t *testing.T, f *os.File) *device {
	t.Helper()
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	d := &device{file: f, stop: stop, done: make(chan struct{})}
	go d.read(stop)
	t.Cleanup(d.close)
	return d
}

// close stops reading and closes the descriptor, as if the proxy died. It may be called twice.
func (d *device) close() {
	d.mu.Lock()
	stop := d.stop
	d.stop = -1
	d.mu.Unlock()
	if stop < 0 {
		return
	}
	_, _ = unix.Write(stop, binary.NativeEndian.AppendUint64(nil, 1))
	<-d.done
	_ = unix.Close(stop)
	_ = d.file.Close()
}

func (d *device) read(stop int) {
	defer close(d.done)
	defer func() {
		d.mu.Lock()
		d.dead = true
		d.mu.Unlock()
	}()
	fd := int(d.file.Fd())
	buf := make([]byte, 1<<16+virtioHeader)
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		if fds[0].Revents == 0 {
			continue
		}
		n, err := unix.Read(fd, buf)
		if err != nil {
			return
		}
		d.mu.Lock()
		d.packets = append(d.packets, append([]byte(nil), buf[virtioHeader:n]...))
		back := d.forward != nil && d.forward(buf[virtioHeader:n])
		d.mu.Unlock()
		if back {
			_, _ = unix.Write(fd, buf[:n])
		}
	}
}

func (d *device) alive() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.dead
}

func (d *device) matching(match func(b []byte) bool) [][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out [][]byte
	for _, p := range d.packets {
		if match(p) {
			out = append(out, p)
		}
	}
	return out
}

func (d *device) inject(t *testing.T, b []byte) {
	t.Helper()
	if _, err := unix.Write(int(d.file.Fd()), append(make([]byte, virtioHeader), b...)); err != nil {
		t.Fatal(err)
	}
}

// packet is what tests look at.
type packet struct {
	src, dst   netip.AddrPort
	proto, ttl byte
	flags      byte // of TCP
	payload    []byte
}

func (p packet) String() string {
	return fmt.Sprintf("%v > %v proto %d flags %#x %d bytes", p.src, p.dst, p.proto, p.flags, len(p.payload))
}

func parsePacket(b []byte) (p packet, ok bool) {
	var src, dst netip.Addr
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		p.proto, p.ttl = b[9], b[8]
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		b = b[min(int(b[0]&15)*4, len(b)):]
	case len(b) >= 40 && b[0]>>4 == 6:
		p.proto, p.ttl = b[6], b[7]
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		b = b[40:]
	default:
		return p, false
	}
	var sport, dport uint16
	switch {
	case p.proto == unix.IPPROTO_TCP && len(b) >= 20:
		sport, dport, p.flags = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), b[13]
		p.payload = b[min(int(b[12]>>4)*4, len(b)):]
	case p.proto == unix.IPPROTO_UDP && len(b) >= 8:
		sport, dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		p.payload = b[8:]
	}
	p.src, p.dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return p, true
}

const (
	flagFIN = 1
	flagSYN = 2
	flagRST = 4
	flagACK = 16
)

// tcpPacket builds a segment with right checksums.
func tcpPacket(src, dst netip.AddrPort, flags byte, seq, ack uint32, payload string) []byte {
	h := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint32(h[4:], seq)
	binary.BigEndian.PutUint32(h[8:], ack)
	h[12], h[13] = 5<<4, flags
	binary.BigEndian.PutUint16(h[14:], 64000)
	return ipPacket(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, append(h, payload...), 16)
}

func udpPacket(src, dst netip.AddrPort, payload string) []byte {
	h := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint16(h[4:], uint16(8+len(payload)))
	return ipPacket(src.Addr(), dst.Addr(), unix.IPPROTO_UDP, append(h, payload...), 6)
}

// ipPacket puts an IP header before a transport segment and sets the segment's checksum at csumAt.
func ipPacket(src, dst netip.Addr, proto byte, segment []byte, csumAt int) []byte {
	pseudo := append(append([]byte{}, src.AsSlice()...), dst.AsSlice()...)
	pseudo = append(pseudo, 0, proto, byte(len(segment)>>8), byte(len(segment)))
	binary.BigEndian.PutUint16(segment[csumAt:], ^onesSum(append(pseudo, segment...)))
	if src.Is6() {
		h := make([]byte, 40)
		h[0], h[6], h[7] = 6<<4, proto, 64
		binary.BigEndian.PutUint16(h[4:], uint16(len(segment)))
		copy(h[8:], src.AsSlice())
		copy(h[24:], dst.AsSlice())
		return append(h, segment...)
	}
	h := make([]byte, 20)
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(segment)))
	copy(h[12:], src.AsSlice())
	copy(h[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(h[10:], ^onesSum(h))
	return append(h, segment...)
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

// echo serves a TCP port that sends back what it gets.
func echo(t *testing.T, l net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = l.Close() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = c.Close() })
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	})
}

// newBenchEnv attaches a pod with one interface and no reader.
func newBenchEnv(b *testing.B) *Attachment {
	b.Helper()
	pod, peer := netnstest.New(b, "pod"), netnstest.New(b, "peer")
	netnstest.Veth(b, pod, "eth0", peer, "p0")
	pod.Addr("eth0", "10.1.0.2/24", "fd01::2/64")
	a, err := Attach(b.Context(), pod.File(), Config{}, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _, _ = a.Close(), a.File.Close() })
	return a
}
