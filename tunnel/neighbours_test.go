package tunnel_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/workloadapi"
)

// inJoined runs test for the paths in memory alone.
func inJoined(t *testing.T, test func(w *world)) {
	inWorld(t, func(w *world) {
		if w.path.joins {
			test(w)
		}
	})
}

// story is all that can be told of a record but for time, the tunnel's port
// and the way that a reset was heard of.
func story(r *tunnel.Record) string {
	service, src, dst := "", "", ""
	if r.Service != nil {
		service = r.Service.Hostname
	}
	if r.SrcWorkload != nil {
		src = r.SrcWorkload.UID
	}
	if r.DstWorkload != nil {
		dst = r.DstWorkload.UID
	}
	text := r.Error()
	switch r.Reason {
	case tunnel.ClientReset, tunnel.ServerReset, tunnel.ClientGone:
		text = r.Reason.Text()
	}
	return fmt.Sprintf("%v %v -> %v %s; %s %s -> %s %s; service %s, baggage %+v, mtls %v, hairpin %v; %d/%d bytes, %v %s %q",
		r.Direction, r.Src.Addr(), r.Dst, r.HBONEAddr, src, r.SrcIdentity, dst, r.DstIdentity,
		service, r.SrcBaggage, r.MutualTLS(), r.Hairpin, r.Sent, r.Received, r.Reason, r.Reason.Flag(), text)
}

// TestNobodyCanTellThePathsApart: whatever happens, the apps see the same and
// both records say the same.
func TestNobodyCanTellThePathsApart(t *testing.T) {
	for name, act := range map[string]func(w *world, a, b *pod, apps *[]*app) *app{
		"both end": func(w *world, a, b *pod, apps *[]*app) *app {
			c := a.call("10.0.0.2:80")
			c.send("question")
			(*apps)[0].send("answer")
			c.closeWrite()
			(*apps)[0].closeWrite()
			return c
		},
		"by service": func(w *world, a, b *pod, apps *[]*app) *app {
			s := service()
			s.Ports[0].TargetPort = 80
			w.put(s)
			b.join(s)
			c := a.call("10.96.0.1:80")
			c.send("x")
			c.closeWrite()
			(*apps)[0].closeWrite()
			return c
		},
		"the client resets": func(w *world, a, b *pod, apps *[]*app) *app {
			c := a.call("10.0.0.2:80")
			c.send("x")
			c.reset()
			return c
		},
		"the server resets after the client's end": func(w *world, a, b *pod, apps *[]*app) *app {
			c := a.call("10.0.0.2:80")
			c.send("x")
			c.closeWrite()
			(*apps)[0].send("y")
			(*apps)[0].reset()
			return c
		},
		"denied": func(w *world, a, b *pod, apps *[]*app) *app {
			w.put(deny("no", 80))
			synctest.Wait()
			return a.call("10.0.0.2:80")
		},
		"a policy is missing": func(w *world, a, b *pod, apps *[]*app) *app {
			b.workload.AuthorizationPolicies = []string{"default/late"}
			w.put(b.workload)
			synctest.Wait()
			return a.call("10.0.0.2:80")
		},
		"denied later": func(w *world, a, b *pod, apps *[]*app) *app {
			c := a.call("10.0.0.2:80")
			c.send("x")
			w.put(deny("no", 80))
			synctest.Wait()
			return c
		},
		"nobody listens":       func(w *world, a, b *pod, apps *[]*app) *app { return a.call("10.0.0.2:81") },
		"the proxy's own port": func(w *world, a, b *pod, apps *[]*app) *app { return a.call("10.0.0.2:15001") },
		"port 0":               func(w *world, a, b *pod, apps *[]*app) *app { return a.call("10.0.0.2:0") },
		"the app does not answer": func(w *world, a, b *pod, apps *[]*app) *app {
			w.silence("10.0.0.2:82")
			c := a.dial("10.0.0.2:82")
			time.Sleep(20 * time.Second)
			synctest.Wait()
			return c
		},
		"an application tunnel with a PROXY header": func(w *world, a, b *pod, apps *[]*app) *app {
			b.workload.ApplicationTunnel = &workloadapi.ApplicationTunnel{Protocol: workloadapi.ApplicationTunnel_PROXY, Port: 80}
			w.put(b.workload)
			synctest.Wait()
			return a.call("10.0.0.2:80")
		},
		"the server's workload goes": func(w *world, a, b *pod, apps *[]*app) *app {
			c := a.call("10.0.0.2:80")
			w.store.Addresses().Apply(nil, []string{b.workload.Uid})
			synctest.Wait()
			return c
		},
		"the client's workload goes": func(w *world, a, b *pod, apps *[]*app) *app {
			c := a.call("10.0.0.2:80")
			w.store.Addresses().Apply(nil, []string{a.workload.Uid})
			synctest.Wait()
			return c
		},
		"the server is removed": func(w *world, a, b *pod, apps *[]*app) *app {
			c := a.call("10.0.0.2:80")
			c.send("x")
			b.Close()
			synctest.Wait()
			return c
		},
		"the client is removed": func(w *world, a, b *pod, apps *[]*app) *app {
			c := a.call("10.0.0.2:80")
			c.send("x")
			a.Close()
			synctest.Wait()
			return c
		},
		"the client is removed while it connects": func(w *world, a, b *pod, apps *[]*app) *app {
			w.silence("10.0.0.2:82")
			c := a.call("10.0.0.2:82")
			a.Close()
			synctest.Wait()
			return c
		},
		"the server has all it may": func(w *world, a, b *pod, apps *[]*app) *app {
			for range 2 {
				a.call("10.0.0.2:80")
			}
			return a.call("10.0.0.2:80")
		},
	} {
		t.Run(name, func(t *testing.T) {
			var first []string
			inWorld(t, func(w *world) {
				w.edit = func(c *tunnel.Config) {
					if c.Workload.Name == "b" {
						c.Limits.Conns = 2
					}
				}
				a, b := pair(w)
				apps := catch(b, 80)
				c := act(w, a, b, apps)
				told := []string{fmt.Sprintf("the client got %q, end %v, error %v, refused %v", c.got, c.eof, c.err != nil, c.refused)}
				for _, s := range *apps {
					told = append(told, fmt.Sprintf("the server got %q, end %v, error %v, from %v", s.got, s.eof, s.err != nil, s.from))
				}
				for _, p := range []*pod{a, b} {
					p.Close()
					synctest.Wait()
					for kind, list := range [][]tunnel.Record{p.records.closed, p.records.failed} {
						for i := range list {
							told = append(told, fmt.Sprintf("%s %d: %s", p.workload.Name, kind, story(&list[i])))
							if joined := w.path.joins && list[i].Reason != tunnel.Limit; list[i].SameNode != joined && list[i].HBONEAddr != "" {
								w.t.Errorf("SameNode = %v: %s", list[i].SameNode, told[len(told)-1])
							}
						}
					}
				}
				slices.Sort(told)
				if first == nil {
					first = told
				}
				if !slices.Equal(told, first) {
					w.t.Errorf("on this path\n%s\nand on the wire\n%s", strings.Join(told, "\n"), strings.Join(first, "\n"))
				}
				if w.path.joins && w.joins.Memory() != 0 {
					w.t.Errorf("%d bytes of buffers are left", w.joins.Memory())
				}
			})
		})
	}
}

// wantPath checks that a call is answered, and on which path.
func (p *pod) wantPath(dst string, sameNode bool) {
	p.w.t.Helper()
	c := p.call(dst)
	c.want("", "open")
	c.reset()
	if r := p.last(tunnel.ClientReset); r.SameNode != sameNode {
		p.w.t.Errorf("SameNode = %v, want %v", r.SameNode, sameNode)
	}
}

// Both sides must hold certificates that the other would take, at the time of
// each connection; else the wire finds out what is wrong.
func TestJoinNeedsBothCertificates(t *testing.T) {
	inJoined(t, func(w *world) {
		sources := map[string]*certSource{}
		w.edit = func(c *tunnel.Config) {
			s := &certSource{ca: w.ca, have: map[identity.ID]*certs.Certificate{}}
			sources[c.Workload.Name], c.Certs = s, s
		}
		a, b := pair(w)
		b.serve(80, echoes)
		a.wantPath("10.0.0.2:80", true)
		id := func(p *pod) identity.ID {
			return identity.MustParse("spiffe://cluster.local/ns/default/sa/" + p.workload.Name)
		}
		// swap gives p another certificate source's answer, or none.
		swap := func(p *pod, ca *certstest.CA) {
			s := sources[p.workload.Name]
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.refuses = ca == nil; s.refuses {
				delete(s.have, id(p))
				return
			}
			s.have[id(p)] = ca.Issue(id(p))
		}
		other := certstest.New()
		for _, p := range []*pod{a, b} {
			swap(p, nil)
			refused := a.call("10.0.0.2:80")
			refused.want("", "no route to host")
			if p == a {
				a.last(tunnel.NoCertificate)
			} else {
				a.last(tunnel.TunnelLost)
				b.lastFailed(tunnel.NoCertificate)
			}
			swap(p, other)
			refused = a.call("10.0.0.2:80")
			refused.want("", "no route to host")
			a.last(tunnel.TLSFailed)
			swap(p, w.ca)
			a.wantPath("10.0.0.2:80", true)
		}
	})
}

// A certificate that expires ends the joins, as it would end new tunnels.
func TestJoinEndsWithTheCertificate(t *testing.T) {
	inJoined(t, func(w *world) {
		manager := certs.NewManager(certs.Config{CA: &failing{CA: w.ca, good: 2}, TTL: time.Hour})
		ctx, stop := context.WithCancel(context.Background())
		var done sync.WaitGroup
		done.Go(func() { _ = manager.Run(ctx) })
		defer done.Wait()
		defer stop()
		w.edit = func(c *tunnel.Config) { c.Certs = manager }
		a, b := pair(w)
		b.serve(80, echoes)
		synctest.Wait()
		a.wantPath("10.0.0.2:80", true)
		time.Sleep(59 * time.Minute)
		a.wantPath("10.0.0.2:80", true)
		time.Sleep(2 * time.Minute)
		a.call("10.0.0.2:80").want("", "no route to host")
		a.last(tunnel.NoCertificate)
		for _, p := range []*pod{a, b} {
			p.Close()
		}
	})
}

// failing is a CA that signs only so often.
type failing struct {
	*certstest.CA
	mu   sync.Mutex
	good int
}

func (f *failing) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	f.mu.Lock()
	f.good--
	ok := f.good >= 0
	f.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("the CA is down")
	}
	return f.CA.Sign(ctx, id, csr, ttl)
}

// Only a pod that is the route's destination beyond doubt is joined.
func TestJoinOnlyWithTheDestination(t *testing.T) {
	for name, c := range map[string]struct {
		edit   func(b *pod)
		joined bool
	}{
		"as it is":              {func(*pod) {}, true},
		"does HBONE by itself":  {func(b *pod) { b.workload.NativeTunnel = true }, false},
		"two addresses":         {func(b *pod) { b.workload.Addresses = append(b.workload.Addresses, []byte{10, 0, 0, 3}) }, true},
		"has become another":    {func(b *pod) { b.workload.Uid = "Kubernetes//Pod/default/heir" }, true},
		"has another's address": {func(b *pod) { b.workload.Addresses[0] = []byte{10, 0, 0, 3} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			inJoined(t, func(w *world) {
				a, b := pair(w)
				b.serve(80, echoes)
				w.store.Addresses().Apply(nil, []string{b.workload.Uid})
				c.edit(b)
				w.put(b.workload)
				synctest.Wait()
				if name == "has another's address" {
					// As far as the mesh knows, the address that is dialled is nobody's.
					w.mu.Lock()
					w.hosts[netip.MustParseAddrPort("10.0.0.3:15008")] = func(*app) {}
					w.mu.Unlock()
					a.dial("10.0.0.3:80")
					synctest.Wait()
					a.Close()
					if r := a.last(tunnel.Closed); r.SameNode {
						t.Error("joined")
					}
					return
				}
				a.wantPath("10.0.0.2:80", c.joined)
			})
		})
	}
}

// A pod that drains, or is gone, is not reached in memory: whoever serves it
// next answers on the wire.
func TestJoinNotWithWhoLeaves(t *testing.T) {
	inJoined(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		c := a.call("10.0.0.2:80")
		drained := make(chan error, 1)
		go func() { drained <- b.Drain(context.Background()) }()
		synctest.Wait()
		a.wantPath("10.0.0.2:80", false)
		c.send("x")
		c.want("x", "open")
		c.closeWrite()
		if r := a.last(tunnel.OK); !r.SameNode {
			t.Error("the first connection was not joined")
		}
		a.Close() // its tunnel to b
		if err := <-drained; err != nil {
			t.Error(err)
		}
		heir := w.pod("b", "10.0.0.2")
		heir.serve(80, echoes)
		a = w.pod("a", "10.0.0.1")
		a.wantPath("10.0.0.2:80", true)
		b.Close()
		a.wantPath("10.0.0.2:80", true)
		heir.Close()
		a.call("10.0.0.2:80")
		if r := a.last(tunnel.TunnelLost); r.SameNode {
			t.Error("a closed pod was reached in memory")
		}
	})
}

// The source gives up when it hears nothing, and the host hears of it.
func TestJoinAnswerHasADeadline(t *testing.T) {
	inJoined(t, func(w *world) {
		w.edit = func(c *tunnel.Config) { c.Timeouts.Answer = 3 * time.Second }
		a, b := pair(w)
		w.silence("10.0.0.2:80")
		c := a.dial("10.0.0.2:80")
		time.Sleep(3*time.Second - time.Nanosecond)
		c.want("", "pending")
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		c.want("", "connection timed out")
		a.last(tunnel.PeerAppTimeout)
		b.last(tunnel.ClientGone)
	})
}

// The host's answer crosses the source's end: nothing is left of either.
func TestJoinAnswerCrossesTheSourcesEnd(t *testing.T) {
	inJoined(t, func(w *world) {
		a, b := pair(w)
		var server *app
		w.raw = map[netip.AddrPort]func(splice.End){netip.MustParseAddrPort("10.0.0.2:80"): func(end splice.End) {
			server = newApp(w, b.loop, end, netip.AddrPort{})
			// On b's loop, right before it answers.
			w.store.Addresses().Apply(nil, []string{a.workload.Uid})
		}}
		c := a.call("10.0.0.2:80")
		c.want("", "connection refused")
		server.want("", "reset")
		if live, err := b.Connections(context.Background()); err != nil || len(live) != 0 {
			t.Errorf("%d live, %v", len(live), err)
		}
		a.last(tunnel.WorkloadGone)
		b.last(tunnel.ClientReset) // not ClientGone: it was answered
		if n := w.joins.Memory(); n != 0 {
			t.Errorf("%d bytes of buffers are left", n)
		}
	})
}

// A visit that comes after the host has begun to leave is declined, and the
// wire gives the answer.
func TestJoinCrossesTheHostsEnd(t *testing.T) {
	for name, c := range map[string]struct {
		leave func(b *pod)
		want  string
	}{
		"drain": {func(b *pod) { _ = b.Drain(context.Background()) }, "open"},
		"close": {func(b *pod) { b.Close() }, "no route to host"},
	} {
		t.Run(name, func(t *testing.T) {
			inJoined(t, func(w *world) {
				if !w.path.apart {
					return // the host's loop is the source's
				}
				a, b := pair(w)
				b.serve(80, echoes)
				goOn := make(chan struct{})
				b.loop.Post(func() { <-goOn })
				left := make(chan struct{})
				go func() { defer close(left); c.leave(b) }()
				synctest.Wait()
				client := a.dial("10.0.0.2:80")
				synctest.Wait()
				close(goOn)
				synctest.Wait()
				client.want("", c.want)
				a.Close()
				<-left
				for _, r := range a.records.closed {
					if r.SameNode {
						t.Error("joined with who leaves")
					}
				}
			})
		})
	}
}

// An idle connection in memory holds no buffer, a stalled one a bounded amount.
func TestJoinHoldsLittle(t *testing.T) {
	inJoined(t, func(w *world) {
		a, b := pair(w)
		apps := catch(b, 80)
		c := a.call("10.0.0.2:80")
		c.send(strings.Repeat("x", 60_000))
		c.want(strings.Repeat("", 0), "open")
		(*apps)[0].want(strings.Repeat("x", 60_000), "open")
		if n := w.joins.Memory(); n != 0 {
			t.Errorf("%d bytes of buffers while idle", n)
		}
		b.loop.Do(func() { (*apps)[0].hold = true })
		sent := 0
		for n := 1; n > 0; synctest.Wait() {
			a.loop.Do(func() { n, _ = c.end.Write(make([]byte, 64<<10)); sent += n })
		}
		// The apps' own pipes hold 64 KiB each.
		if n := w.joins.Memory(); n < 64<<10 || n > 128<<10 || sent > 320<<10 {
			t.Errorf("%d bytes of buffers, %d sent, for a reader that does not read", n, sent)
		}
	})
}
