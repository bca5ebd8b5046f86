package meshtest

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/ztun/ztun/tun/tuntest"
	"github.com/ztun/ztun/tunnel"
)

// newFar is a mesh whose nodes have a wire between them.
func newFar(t *testing.T, p tuntest.Path) (client, server, outside *Pod, wire *tuntest.Wire) {
	t.Helper()
	m := New(t)
	far, wire := m.Far(tuntest.Options{Seed: 1, AtoB: p, BtoA: p})
	na, nb := m.Node("na"), m.NodeOn(far, "nb")
	return m.Pod("client", na), m.Pod("server", nb), m.BareOn(far, "outside"), wire
}

func TestFarNodeIsReachedOverTheWire(t *testing.T) {
	client, server, outside, wire := newFar(t, tuntest.Path{Cut: true, Loss: 0.01, Delay: time.Millisecond, Reorder: 0.01})
	server.serve(t, ":8080", hello)
	outside.serve(t, ":8080", hello)
	for _, a := range []string{addr(server.Addr, 8080), addr(server.Addr6, 8080), addr(outside.Addr, 8080), addr(outside.Addr6, 8080)} {
		client.mustAsk(t, a)
	}
	rec := server.Node.Records.Wait(t, "inbound record", func(r *tunnel.Record) bool { return r.Direction == tunnel.Inbound })
	if !rec.MutualTLS() {
		t.Error("the far node was reached in plaintext")
	}
	ab, ba := wire.Stats()
	if ab.Packets == 0 || ba.Packets == 0 {
		t.Errorf("wire %+v, and back %+v", ab, ba)
	}
}

func TestNothingGetsPastTheWire(t *testing.T) {
	client, server, _, wire := newFar(t, tuntest.Path{})
	server.serve(t, ":8080", hello)
	client.mustAsk(t, addr(server.Addr, 8080))
	wire.Set(tuntest.Path{Loss: 1}, tuntest.Path{Loss: 1})
	c, err := client.NS.Dial("tcp", addr(server.Addr, 8080), time.Second)
	if err == nil {
		c.Close()
	}
	if e := net.Error(nil); !errors.As(err, &e) || !e.Timeout() {
		t.Errorf("%v, want a timeout", err)
	}
}
