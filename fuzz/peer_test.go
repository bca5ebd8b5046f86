package fuzz

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
)

// FuzzPeer lets a peer with a valid certificate say anything after the
// handshake. It must reach no more of the app than the policies allow it, and
// a neighbour's stream, open all the time, must have every byte.
func FuzzPeer(f *testing.F) {
	s := newSite(f)
	for i := range 6 {
		f.Add(noise(uint64(i), 60*(i+1)))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		n := newNode(t, s)
		n.tap.watch(mayLeave)
		script := newScript(in)
		neighbour := n.inbound("friend", friendAddr)
		n.do(func() { neighbour.say(noise(1, 3000), false) })
		n.wait("the neighbour's first echo", neighbour.done)

		n.hostilePeer(script)

		n.do(func() { neighbour.say(noise(2, 3000), true) })
		n.wait("the neighbour's second echo", neighbour.done)
		if err := n.tap.err(); err != nil {
			t.Error(err)
		}
		n.checkReached()
		if stats, _, _ := n.pod.Stats(); stats.Live.Load() > 300 {
			t.Errorf("%d connections", stats.Live.Load())
		}
		bounded(t)
	})
}

// checkReached holds what reached the app against the policies.
func (n *node) checkReached() {
	for _, c := range n.seen() {
		switch c.src.Addr() {
		case peerAddr, peerAddr6:
			c.peer = accountID("peer").String()
		case friendAddr:
			c.peer = accountID("friend").String()
		}
		own := c.dst.Addr() == appAddr || c.dst.Addr() == appAddr6
		proxy := slices.Contains([]uint16{15001, 15006, 15008}, c.dst.Port())
		if !own || proxy || !allowed(nodePolicies, c) {
			n.Errorf("%v as %q reached %v", c.src, c.peer, c.dst)
		}
	}
}

// hostilePeer connects, and sends frames and bytes by script.
func (n *node) hostilePeer(s *script) {
	n.Helper()
	src, dst := peerAddr, appAddr
	if s.one(4) {
		src, dst = peerAddr6, appAddr6
	}
	p := &talker{ends: s.one(2), deaf: s.one(8), done: make(chan error, 1)}
	at := netip.AddrPortFrom(dst, netstack.TunnelPort)
	shaken := make(chan error, 1)
	n.wait("the peer's connect", n.dial(netip.AddrPortFrom(src, 0), at, func(end splice.End) {
		config := n.site.certs[accountID("peer")].ClientTLS([]identity.ID{accountID("app")})
		n.site.shakes.Start(n.kernel.Loop(), end, hbone.AsClient, config, netip.AddrPortFrom(src, 1), at, func(tls *hbone.TLS, err error) {
			if err == nil {
				p.start(tls)
			}
			shaken <- err
		})
	}))
	n.wait("the peer's handshake", shaken)
	var all []byte
	if !s.one(16) {
		all = append(all, http2.ClientPreface...)
		all = append(all, rawFrame{kind: http2.FrameSettings, length: -1}.bytes()...)
	}
	next := uint32(1)
	for s.more() && len(all) < 256<<10 {
		var b []byte
		if s.one(8) {
			b = s.bytes(s.pick(40))
		} else {
			b = s.peerFrame(&next).bytes()
		}
		for range max(1, s.pick(256)-200) {
			all = append(all, b...)
		}
	}
	p.ends = p.ends || !whole(all)
	n.do(func() { p.send(all) })
	n.wait("the peer's end", p.done)
}

// whole reports whether a connection's bytes end with a frame: in the midst of
// one the answer to a PING may be waited for without an end.
func whole(b []byte) bool {
	b, _ = bytes.CutPrefix(b, []byte(http2.ClientPreface))
	for len(b) >= 9 {
		n := 9 + (int(b[0])<<16 | int(b[1])<<8 | int(b[2]))
		if n > len(b) {
			return false
		}
		b = b[n:]
	}
	return len(b) == 0
}

// A talker sends bytes to the last and reads what comes, or does not.
type talker struct {
	end        splice.End
	out        []byte
	ends, deaf bool
	over       bool
	done       chan error // when all is sent, or nobody wants it
	buf        []byte
}

func (p *talker) start(end splice.End) {
	p.end, p.buf = end, make([]byte, 16<<10)
	end.Notify(p.ready)
}

// send is the only call; ready does nothing before it.
func (p *talker) send(b []byte) {
	p.out = append(b, rawFrame{kind: http2.FramePing, length: -1, payload: []byte("the last")}.bytes()...)
	p.ready()
}

// ready writes all, and ends once the answer to the last PING has come, or the
// proxy has had enough. Who is deaf reads nothing until all is written.
func (p *talker) ready() {
	if p.over || p.out == nil {
		return
	}
	if len(p.out) > 0 {
		k, err := p.end.Write(p.out)
		p.out = p.out[k:]
		switch {
		case errors.Is(err, splice.ErrAgain) && p.deaf:
			// It would stand for ever: who does not read is not read.
			p.deaf = false
		case err != nil && !errors.Is(err, splice.ErrAgain):
			p.finish()
			return
		}
		if len(p.out) == 0 && p.ends {
			_ = p.end.CloseWrite()
		}
	}
	for !p.deaf || len(p.out) == 0 {
		k, err := p.end.Read(p.buf)
		switch {
		case bytes.Contains(p.buf[:k], []byte("the last")):
			p.finish()
			return
		case errors.Is(err, splice.ErrAgain):
			return
		case err != nil:
			p.finish()
			return
		}
	}
}

func (p *talker) finish() {
	p.over = true
	p.end.Reset(nil)
	p.end.Close()
	p.done <- nil
}

// peerFrame draws a frame: half of the time a CONNECT, to anywhere.
func (s *script) peerFrame(next *uint32) rawFrame {
	if s.one(2) {
		return s.frame(false)
	}
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	put := func(name, value string) {
		_ = enc.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: true})
	}
	put(":method", "CONNECT")
	put(":authority", s.authority())
	for range s.pick(4) {
		switch s.pick(6) {
		case 0:
			put("forwarded", choose(s, `for="10.0.0.4:1"`, `for="10.0.0.4:1";host=own.default.svc.cluster.local`, `host=`, "\"", `for=x;host="`))
		case 1:
			put("baggage", choose(s, "k8s.namespace.name=default,service.name=friend", "=,=,", string(s.bytes(10))))
		case 2:
			put("x-forwarded-network", choose(s, "", "other"))
		case 3:
			put("traceparent", "00-"+string(s.bytes(8)))
		case 4:
			put("x-a", string(bytes.Repeat([]byte{'v'}, 20*s.pick(256))))
		case 5:
			put("principal", accountID("friend").String())
		}
	}
	f := rawFrame{kind: http2.FrameHeaders, flags: http2.FlagHeadersEndHeaders, id: *next, length: -1, payload: b.Bytes()}
	if s.one(8) {
		f.flags |= http2.FlagHeadersEndStream
	}
	if !s.one(16) {
		*next += 2
	}
	return f
}

func (s *script) authority() string {
	port := choose(s, fmt.Sprint(appPort), fmt.Sprint(appPort), "8081", "9999", "15008", "15001", "15006", "0", "65536", "08080", "", "80", "81")
	host := choose(s, "10.0.0.1", "10.0.0.1", "10.0.0.1", "[fd00::1]", "10.0.0.2", "10.0.0.4", "[::ffff:10.0.0.1]", "127.0.0.1", "[::1]", "0.0.0.0",
		"own.default.svc.cluster.local", "web.default.svc.cluster.local", "10.96.0.12", "169.254.169.254", "", "[fd00::1%eth0]", "010.0.0.1", "192.0.2.1")
	if s.one(16) {
		return string(s.bytes(20))
	}
	return host + ":" + port
}
