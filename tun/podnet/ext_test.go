package podnet

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// withExtensions puts extension headers between the IPv6 header and TCP.
func withExtensions(b []byte, kinds ...byte) []byte {
	var ext []byte
	next := append(slices.Clone(kinds[1:]), unix.IPPROTO_TCP)
	for i, k := range kinds {
		switch k {
		case unix.IPPROTO_FRAGMENT: // atomic: offset 0, no more
			ext = append(ext, next[i], 0, 0, 0, 0, 0, 0, 1)
		default: // six bytes of padding
			ext = append(ext, next[i], 0, 1, 4, 0, 0, 0, 0)
		}
	}
	out := append(append(append([]byte{}, b[:40]...), ext...), b[40:]...)
	out[6] = kinds[0]
	binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	return out
}

// hiddenSegments sends a SYN behind extension headers and counts the segments that the pod's kernel takes for itself.
func (e *env) hiddenSegments(port uint16, kinds ...byte) int {
	e.t.Helper()
	before := e.inSegs()
	syn := tcpPacket(netip.AddrPortFrom(farAddr[6], 9), netip.AddrPortFrom(podAddr[6], port), flagSYN, 1, 0, "")
	e.fromPeer(withExtensions(syn, kinds...))
	e.settle()
	return e.inSegs() - before
}

func TestExtensionHeadersAreCapturedOrDropped(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	for i, c := range []struct {
		kinds    []byte
		captured bool
	}{
		{[]byte{60}, true}, {[]byte{0}, true}, {[]byte{44}, true}, {[]byte{43}, true}, {[]byte{44, 43}, false}, {[]byte{44, 44}, false},
		{[]byte{44, 60}, false}, {[]byte{0, 60, 44, 60}, false}, {slices.Repeat([]byte{60}, 18), false},
	} {
		atDevice := func() int {
			return len(e.dev.matching(func(b []byte) bool { p, ok := parsePacket(b); return ok && p.src.Addr() == farAddr[6] }))
		}
		before := atDevice()
		if n := e.hiddenSegments(7000+uint16(i), c.kinds...); n != 0 {
			t.Errorf("TCP behind %v reached the app", c.kinds)
		}
		if got := atDevice() > before; got != c.captured {
			t.Errorf("TCP behind %v captured = %v, want %v", c.kinds, got, c.captured)
		}
	}
	// Honest fragments of UDP pass.
	in := e.pod.ListenPacket("udp6", netip.AddrPortFrom(podAddr[6], 9001).String())
	big := strings.Repeat("x", 4000)
	out := e.peer.ListenPacket("udp6", netip.AddrPortFrom(peerAddr[6], 9002).String())
	if _, err := out.WriteTo([]byte(big), net.UDPAddrFromAddrPort(netip.AddrPortFrom(podAddr[6], 9001))); err != nil {
		t.Fatal(err)
	}
	_ = in.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, _, err := in.ReadFrom(make([]byte, 5000)); err != nil || n != len(big) {
		t.Errorf("a fragmented datagram: %d bytes, %v", n, err)
	}
}
