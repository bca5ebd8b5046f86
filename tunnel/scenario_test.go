package tunnel_test

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

// pair is a world with two pods.
func pair(w *world) (a, b *pod) { return w.pod("a", "10.0.0.1"), w.pod("b", "10.0.0.2") }

// catch makes port of the pod listen, and returns where its connections go.
func catch(p *pod, port uint16) *[]*app {
	var apps []*app
	p.serve(port, func(a *app) { apps = append(apps, a) })
	return &apps
}

func deny(name string, port uint32) *securityapi.Authorization {
	return policy(name, securityapi.Action_DENY, &securityapi.Match{DestinationPorts: []uint32{port}})
}

func policy(name string, action securityapi.Action, m *securityapi.Match) *securityapi.Authorization {
	return &securityapi.Authorization{
		Name: name, Namespace: "default", Scope: securityapi.Scope_NAMESPACE, Action: action,
		Rules: []*securityapi.Rule{{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{m}}}}},
	}
}

func TestAllowedCallIsEchoedAndRecordedOnBothSides(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		apps := catch(b, 8080)
		c := a.call("10.0.0.2:8080")
		server := (*apps)[0]
		server.echo = true
		if want := netip.MustParseAddr("10.0.0.1"); server.from.Addr() != want {
			t.Errorf("the server saw %v, want %v", server.from, want)
		}
		c.send("hello")
		c.want("hello", "open")
		c.closeWrite()
		c.want("hello", "eof")

		out, in := a.last(tunnel.OK), b.last(tunnel.OK)
		if out.Sent != 5 || out.Received != 5 || in.Sent != 5 || in.Received != 5 {
			t.Errorf("bytes: %d/%d outbound, %d/%d inbound", out.Sent, out.Received, in.Sent, in.Received)
		}
		for _, r := range []tunnel.Record{out, in} {
			if r.SrcIdentity.String() != "spiffe://cluster.local/ns/default/sa/a" || r.DstIdentity.String() != "spiffe://cluster.local/ns/default/sa/b" ||
				r.HBONEAddr != "10.0.0.2:8080" || r.Dst.String() != "10.0.0.2:15008" || r.SrcWorkload.Name != "a" || r.DstWorkload.Name != "b" || !r.MutualTLS() {
				t.Errorf("%v record: %+v", r.Direction, r)
			}
		}
		if out.Trace != in.Trace || in.SrcBaggage != nil {
			t.Errorf("trace %v and %v, baggage %+v though the mesh knows the client", out.Trace, in.Trace, in.SrcBaggage)
		}
	})
}

func TestPolicyDenialIsARefusal(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(9999, echoes)
		w.put(deny("deny-9999", 9999))
		synctest.Wait()
		a.call("10.0.0.2:9999").want("", "connection refused")
		if got, want := a.last(tunnel.PeerDenied), "http status: 401 Unauthorized"; !strings.HasPrefix(got.Error(), want) || got.Reason.Flag() != "CONNECT" {
			t.Errorf("error %q, want %q", got.Error(), want)
		}
		if got, want := b.last(tunnel.Denied), "connection closed due to policy rejection: explicitly denied by: default/deny-9999"; got.Error() != want || got.Reason.Flag() != "DENY" {
			t.Errorf("error %q, want %q", got.Error(), want)
		}
	})
}

func TestAPolicyThatIsNotDeliveredIsNotOpen(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		b.workload.AuthorizationPolicies = []string{"default/late"}
		w.put(b.workload)
		synctest.Wait()
		a.call("10.0.0.2:80").want("", "connection refused")
		b.last(tunnel.PolicyMissing)
	})
}

func TestRefusalsReachTheAppAsWhatTheyAre(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		a.call("10.0.0.2:7777").want("", "connection refused")
		a.last(tunnel.PeerRefused)
		if got := b.last(tunnel.ConnectRefused); got.Reason.Status() != 503 {
			t.Errorf("status %d", got.Reason.Status())
		}

		w.silence("10.0.0.2:81")
		c := a.dial("10.0.0.2:81")
		time.Sleep(11 * time.Second)
		synctest.Wait()
		c.want("", "connection timed out")
		a.last(tunnel.PeerAppTimeout)
		b.last(tunnel.ConnectTimeout)

		a.call("192.0.2.1:80").want("", "no route to host")
		a.last(tunnel.ConnectUnreachable)

		w.put(workload("gone", "10.0.0.9"))
		synctest.Wait()
		a.call("10.0.0.9:80").want("", "no route to host")
		a.last(tunnel.ConnectUnreachable)

		w.silence("10.0.0.9:15008")
		c = a.dial("10.0.0.9:80")
		time.Sleep(11 * time.Second)
		synctest.Wait()
		c.want("", "connection timed out")
		if got := a.last(tunnel.PeerTimeout); got.Reason.Flag() != "NETWORK_POLICY" {
			t.Errorf("flag %s", got.Reason.Flag())
		}
	})
}

func TestHalfCloseBothWays(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		apps := catch(b, 80)
		c := a.call("10.0.0.2:80")
		server := (*apps)[0]
		c.send("question")
		c.closeWrite()
		server.want("question", "eof")
		server.send("answer")
		c.want("answer", "open")
		server.closeWrite()
		c.want("answer", "eof")

		c = a.call("10.0.0.2:80")
		server = (*apps)[1]
		server.send("banner") // the server speaks first
		server.closeWrite()
		c.want("banner", "eof")
		c.send("thanks")
		server.want("thanks", "open")
		c.closeWrite()
		server.want("thanks", "eof")
		a.last(tunnel.OK)
		b.last(tunnel.OK)
	})
}

func TestResetStaysAResetBothWays(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		apps := catch(b, 80)
		c := a.call("10.0.0.2:80")
		c.send("x")
		c.reset()
		(*apps)[0].want("x", "reset")
		a.last(tunnel.ClientReset)
		b.last(tunnel.ClientReset)

		c = a.call("10.0.0.2:80")
		(*apps)[1].send("y")
		(*apps)[1].reset()
		c.want("y", "reset")
		if got := a.last(tunnel.ServerReset); got.Reason.Flag() != "-" {
			t.Errorf("flag %s", got.Reason.Flag())
		}
		b.last(tunnel.ServerReset)
	})
}

func TestPolicyChangeCutsLiveConnections(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		apps := catch(b, 80)
		other := catch(b, 81)
		c, kept := a.call("10.0.0.2:80"), a.call("10.0.0.2:81")
		c.send("x")
		w.put(deny("late", 80))
		synctest.Wait()
		c.want("", "reset")
		(*apps)[0].want("x", "reset")
		if got, want := b.last(tunnel.PolicyChange), "connection closed due to policy change: explicitly denied by: default/late"; got.Error() != want || got.Received != 1 {
			t.Errorf("%q after %d bytes", got.Error(), got.Received)
		}
		a.last(tunnel.ServerReset)
		kept.send("still")
		(*other)[0].want("still", "open")
		if s, _, _ := b.Stats(); s.Cut.Load() != 1 {
			t.Errorf("%d were cut, want 1", s.Cut.Load())
		}
	})
}

// ztunnel keeps the workload as it was when the connection was opened.
func TestWorkloadChangeIsCheckedToo(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		p := deny("selected", 80)
		p.Scope = securityapi.Scope_WORKLOAD_SELECTOR
		w.put(p)
		synctest.Wait()
		c := a.call("10.0.0.2:80")
		c.want("", "open")
		b.workload.AuthorizationPolicies = []string{"default/selected"}
		w.put(b.workload)
		synctest.Wait()
		c.want("", "reset")
		b.last(tunnel.PolicyChange)
	})
}

func TestWorkloadRemovalCutsWhatLives(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		c := a.call("10.0.0.2:80")
		c.want("", "open")
		w.store.Addresses().Apply(nil, []string{b.workload.Uid})
		synctest.Wait()
		c.want("", "reset")
		b.last(tunnel.WorkloadGone)
	})
}

func TestOutboundWaitsForItsWorkload(t *testing.T) {
	inWorld(t, func(w *world) {
		b := w.pod("b", "10.0.0.2")
		b.serve(80, echoes)
		a := w.start("a", "10.0.0.1")
		c := a.call("10.0.0.2:80")
		c.want("", "pending")
		w.put(a.workload)
		synctest.Wait()
		c.want("", "open")

		unknown := w.start("unknown", "10.0.0.3")
		c = unknown.call("10.0.0.2:80")
		time.Sleep(5*time.Second - time.Nanosecond)
		c.want("", "pending")
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		c.want("", "no route to host")
		unknown.lastFailed(tunnel.UnknownWorkload)
	})
}

func TestWithoutACertificate(t *testing.T) {
	inWorld(t, func(w *world) {
		w.certs.refuses = true
		a, b := pair(w)
		b.serve(80, echoes)
		a.call("10.0.0.2:80").want("", "no route to host")
		if got := a.last(tunnel.NoCertificate); got.Reason.Flag() != "IDENTITY_ERROR" {
			t.Errorf("flag %s", got.Reason.Flag())
		}
		w.certs.mu.Lock()
		w.certs.refuses, w.certs.hangs = false, true
		w.certs.mu.Unlock()
		c := a.call("10.0.0.2:80")
		c.want("", "pending")
		time.Sleep(5 * time.Second)
		synctest.Wait()
		c.want("", "no route to host")
	})
}

func TestAPeerOfTheWrongIdentityGetsNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		apps := catch(b, 80)
		stale := workload("b", "10.0.0.2")
		stale.ServiceAccount, stale.Uid = "other", "Kubernetes//Pod/default/stale"
		stale.Addresses = [][]byte{{10, 0, 0, 2}}
		w.put(stale) // the newest owner of the address, as far as the mesh knows
		synctest.Wait()
		a.call("10.0.0.2:80").want("", "no route to host")
		a.last(tunnel.TLSFailed)
		if len(*apps) != 0 {
			t.Error("the app was reached")
		}
	})
}

func TestAReusedAddressNeverMeetsTheOldTunnel(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		a.call("10.0.0.2:80").want("", "open")
		w.store.Addresses().Apply(nil, []string{b.workload.Uid})
		heir := workload("b", "10.0.0.2")
		heir.Uid = "Kubernetes//Pod/default/heir"
		w.put(heir)
		synctest.Wait()
		w.wantTunnels(1)
		a.call("10.0.0.2:80").want("", "open")
		w.wantTunnels(2)
	})
}

// service is server.default.svc.cluster.local:80 at 10.96.0.1, target 8080.
func service() *workloadapi.Service {
	return &workloadapi.Service{
		Name: "server", Namespace: "default", Hostname: "server.default.svc.cluster.local",
		Addresses: []*workloadapi.NetworkAddress{{Address: []byte{10, 96, 0, 1}}},
		Ports:     []*workloadapi.Port{{ServicePort: 80, TargetPort: 8080}, {ServicePort: 15008, TargetPort: 15008}},
	}
}

func (p *pod) join(s *workloadapi.Service) {
	p.workload.Services = map[string]*workloadapi.PortList{s.Namespace + "/" + s.Hostname: {Ports: s.Ports}}
	p.w.put(p.workload)
	synctest.Wait()
}

func TestCallByService(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(8080, echoes)
		w.put(service())
		a.call("10.96.0.1:80").want("", "connection refused") // no endpoint
		a.lastFailed(tunnel.NoUpstream)
		b.join(service())
		c := a.call("10.96.0.1:80")
		c.send("x")
		c.closeWrite()
		c.want("x", "eof")
		for _, r := range []tunnel.Record{a.last(tunnel.OK), b.last(tunnel.OK)} {
			if r.Service == nil || r.Service.Name != "server" || r.HBONEAddr != "10.0.0.2:8080" {
				t.Errorf("%v record: service %+v, authority %s", r.Direction, r.Service, r.HBONEAddr)
			}
		}
		a.call("10.96.0.1:81").want("", "connection refused")
		a.lastFailed(tunnel.NoPort)
	})
}

func TestHairpinIsDialledFromTheServicesAddress(t *testing.T) {
	inWorld(t, func(w *world) {
		b := w.pod("b", "10.0.0.2")
		w.put(service())
		b.join(service())
		apps := catch(b, 8080)
		c := b.call("10.96.0.1:80")
		(*apps)[0].echo = true
		if got := (*apps)[0].from.Addr().String(); got != "10.96.0.1" {
			t.Errorf("the app saw %s, want 10.96.0.1", got)
		}
		c.send("me")
		c.closeWrite()
		c.want("me", "eof")
		var records []tunnel.Record
		b.loop.Do(func() { records = b.records.closed })
		if len(records) != 2 || records[0].Direction == records[1].Direction || !records[0].Hairpin || records[0].Sent != 2 || records[1].Sent != 2 {
			t.Errorf("records: %+v", records)
		}
		w.wantTunnels(0)

		c = b.call("10.96.0.1:80")
		w.put(policy("deny-self", securityapi.Action_DENY, &securityapi.Match{Principals: []*securityapi.StringMatch{{MatchType: &securityapi.StringMatch_Exact{Exact: "cluster.local/ns/default/sa/b"}}}}))
		synctest.Wait()
		c.want("", "reset")
		b.call("10.96.0.1:80").want("", "connection refused")
		b.call("10.96.0.1:15008").want("", "connection refused")
		b.lastFailed(tunnel.SelfCall)
		if s, _, _ := b.Stats(); s.Live.Load() != 0 || s.Pending.Load() != 0 {
			t.Errorf("%d live, %d pending", s.Live.Load(), s.Pending.Load())
		}
	})
}

func TestSelfCallsAreDeniedEarly(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		for _, dst := range []string{"10.0.0.1:15001", "10.0.0.1:15006", "10.0.0.1:15008", "127.0.0.1:15008", "[::ffff:10.0.0.1]:15008"} {
			a.call(dst).want("", "connection refused")
			a.lastFailed(tunnel.SelfCall)
		}
		a.call("10.0.0.2:15008").want("", "connection refused") // CONNECT to the peer's own port
		b.lastFailed(tunnel.SelfCall)
	})
}

func TestPlaintextInbound(t *testing.T) {
	inWorld(t, func(w *world) {
		plain := w.start("plain", "10.0.0.1")
		plain.workload.TunnelProtocol = workloadapi.TunnelProtocol_NONE
		w.put(plain.workload)
		b := w.pod("b", "10.0.0.2")
		apps := catch(b, 80)
		c := b.plaintext("10.0.0.1:5555", "10.0.0.2:80")
		if got := (*apps)[0].from.String(); got != "10.0.0.1:5555" {
			t.Errorf("the app saw %s, want the client's own port", got)
		}
		c.want("", "open")
		w.put(policy("strict", securityapi.Action_DENY, &securityapi.Match{NotPrincipals: []*securityapi.StringMatch{{MatchType: &securityapi.StringMatch_Presence{}}}}))
		synctest.Wait()
		c.want("", "reset")
		if r := b.last(tunnel.PolicyChange); r.MutualTLS() || r.SrcWorkload.Name != "plain" || !r.SrcIdentity.IsZero() {
			t.Errorf("record: %+v", r)
		}
		b.plaintext("10.0.0.1:5556", "10.0.0.2:80").want("", "connection refused")
		b.last(tunnel.Denied)
		b.plaintext("10.0.0.1:5556", "10.0.0.2:15001").want("", "connection refused")
		b.lastFailed(tunnel.SelfCall)
	})
}

func TestTCPAndPassthroughAreDialledFromThePodsAddress(t *testing.T) {
	inWorld(t, func(w *world) {
		a := w.pod("a", "10.0.0.1")
		var seen *app
		outside := netip.MustParseAddrPort("192.0.2.1:80")
		w.hosts[outside] = func(s *app) { seen = s; s.echo = true }
		c := a.call(outside.String())
		c.send("x")
		c.closeWrite()
		c.want("x", "eof")
		if got := seen.from.String(); got != "10.0.0.1:0" {
			t.Errorf("dialled from %s", got)
		}
		if r := a.last(tunnel.OK); r.MutualTLS() || r.DstWorkload != nil || r.Dst != outside {
			t.Errorf("record: %+v", r)
		}
	})
}

func TestWaypointsAreRefusedNotBypassed(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		b.workload.Waypoint = &workloadapi.GatewayAddress{
			Destination:   &workloadapi.GatewayAddress_Hostname{Hostname: &workloadapi.NamespacedHostname{Namespace: "default", Hostname: "waypoint"}},
			HboneMtlsPort: 15008,
		}
		w.put(b.workload)
		synctest.Wait()
		a.call("10.0.0.2:80").want("", "no route to host")
		a.lastFailed(tunnel.Unsupported)
	})
}

func TestAppTunnelWithProxyIsRefused(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		b.workload.ApplicationTunnel = &workloadapi.ApplicationTunnel{Protocol: workloadapi.ApplicationTunnel_PROXY, Port: 15088}
		w.put(b.workload)
		synctest.Wait()
		a.call("10.0.0.2:80").want("", "no route to host")
		b.lastFailed(tunnel.Unsupported)
	})
}

func TestLimits(t *testing.T) {
	inWorld(t, func(w *world) {
		w.edit = func(c *tunnel.Config) { c.Limits.Conns = 2 }
		a := w.pod("a", "10.0.0.1")
		w.edit = nil
		b := w.pod("b", "10.0.0.2")
		b.serve(80, echoes)
		c := a.call("10.0.0.2:80")
		a.call("10.0.0.2:80").want("", "open")
		a.call("10.0.0.2:80").want("", "connection refused")
		a.lastFailed(tunnel.Limit)
		c.closeWrite()
		a.call("10.0.0.2:80").want("", "open")
		if s, _, _ := a.Stats(); s.Limited.Load() != 1 || s.Live.Load() != 2 || s.Pending.Load() != 0 {
			t.Errorf("limited %d, live %d, pending %d", s.Limited.Load(), s.Live.Load(), s.Pending.Load())
		}
	})
}

// TestDrainLeavesNewToTheNextAndWaitsForTheRest: SYNs stay unanswered, what
// peers have sent already is served.
func TestDrainLeavesNewToTheNextAndWaitsForTheRest(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		c := a.call("10.0.0.2:80")
		drained := make(chan error, 1)
		go func() { drained <- b.Drain(context.Background()) }()
		synctest.Wait()
		b.call("192.0.2.1:80").want("", "connection timed out")
		late := a.call("10.0.0.2:80") // Its SYN was answered before the stack stopped.
		late.send("y")
		late.want("y", "open")
		late.closeWrite()
		synctest.Wait()
		a.last(tunnel.OK)
		c.send("x")
		c.want("x", "open")
		select {
		case <-drained:
			t.Fatal("drained with a live connection")
		default:
		}
		c.closeWrite()
		if err := <-drained; err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		a.call("192.0.2.1:80")
		if err := a.Drain(ctx); err != nil {
			t.Error(err)
		}
	})
}

// A connection that waited for its workload when the drain began is left to the
// next proxy too.
func TestDrainLeavesWhatWaitedToTheNext(t *testing.T) {
	inWorld(t, func(w *world) {
		b := w.pod("b", "10.0.0.2")
		b.serve(80, echoes)
		a := w.start("a", "10.0.0.1")
		w.certs.Prefetch(identity.MustParse("spiffe://cluster.local/ns/default/sa/a"))
		c := a.call("10.0.0.2:80")
		drained := make(chan error, 1)
		go func() { drained <- a.Drain(context.Background()) }()
		synctest.Wait()
		w.put(a.workload)
		synctest.Wait()
		c.want("", "connection timed out")
		a.last(tunnel.Draining)
		if err := <-drained; err != nil {
			t.Error(err)
		}
	})
}

// TestReportTellsOfLiveConnections: each byte once, and nothing of those that
// are not accepted.
func TestReportTellsOfLiveConnections(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		apps := catch(b, 80)
		report := func(p *pod, calls int, request, response uint64) {
			t.Helper()
			p.records.progress = nil
			if err := p.Report(context.Background()); err != nil {
				t.Error(err)
			}
			if n, moved := len(p.records.progress), p.records.moved; n != calls || moved != [2]uint64{request, response} {
				t.Errorf("told of %d connections and of %v bytes so far, want %d and %d, %d", n, moved, calls, request, response)
			}
		}
		report(a, 0, 0, 0)
		w.silence("10.0.0.2:81")
		c, _ := a.call("10.0.0.2:80"), a.call("10.0.0.2:81")
		server := (*apps)[0]
		c.send("hello")
		server.want("hello", "open")
		report(a, 1, 5, 0)
		server.send("answer!")
		c.want("answer!", "open")
		report(a, 1, 5, 7)
		report(a, 1, 5, 7)
		report(b, 1, 5, 7)
		c.send("more")
		c.closeWrite()
		server.closeWrite()
		synctest.Wait()
		if r := a.last(tunnel.OK); r.Sent != 9 || r.Received != 7 {
			t.Errorf("%d and %d bytes, want 9 and 7", r.Sent, r.Received)
		}
		report(a, 0, 9, 7)
		report(b, 0, 9, 7)
	})
}

// More than a turn's worth.
func TestReportTakesTurns(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		const calls = 1100
		for range calls {
			a.call("10.0.0.2:80").send("x")
		}
		synctest.Wait()
		if err := a.Report(context.Background()); err != nil {
			t.Fatal(err)
		}
		if n, moved := len(a.records.progress), a.records.moved; n != calls || moved != [2]uint64{calls, calls} {
			t.Errorf("told of %d connections and %v bytes, want %d and as many both ways", n, moved, calls)
		}
		a.Close()
		if err := a.Report(context.Background()); err != tunnel.ErrClosed {
			t.Errorf("of a closed pod: %v, want ErrClosed", err)
		}
	})
}

func TestCloseCutsAndAnswersEverything(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		apps := catch(b, 80)
		w.silence("10.0.0.2:81")
		c, pending := a.call("10.0.0.2:80"), a.call("10.0.0.2:81")
		pending.want("", "pending")
		a.Close()
		synctest.Wait()
		c.want("", "reset")
		(*apps)[0].want("", "reset")
		pending.want("", "connection refused")
		a.last(tunnel.Closed)
		if n := len(a.records.open); n != 0 {
			t.Errorf("%d records are open", n)
		}
		reasons := []tunnel.Reason{b.records.closed[0].Reason, b.records.closed[1].Reason}
		if !slices.Contains(reasons, tunnel.ClientGone) || !slices.Contains(reasons, tunnel.ClientReset) {
			t.Errorf("the peer recorded %v", reasons)
		}
		a.call("10.0.0.2:80").want("", "connection refused")
	})
}

func TestThousandStreamsToOnePod(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		calls := make([]*app, 1000)
		for i := range calls {
			calls[i] = a.dial("10.0.0.2:80")
		}
		synctest.Wait()
		for _, c := range calls {
			c.loop.Do(func() { _, _ = c.end.Write([]byte("x")); _ = c.end.CloseWrite() })
		}
		synctest.Wait()
		for _, c := range calls {
			c.want("x", "eof")
		}
		w.wantTunnels(10)
		if live, err := a.Connections(context.Background()); err != nil || len(live) != 0 {
			t.Errorf("%d live, %v", len(live), err)
		}
	})
}

func TestConnectionsListsWhatLives(t *testing.T) {
	inWorld(t, func(w *world) {
		a, b := pair(w)
		b.serve(80, echoes)
		a.call("10.0.0.2:80").send("abc")
		live, err := b.Connections(context.Background())
		if err != nil || len(live) != 1 || !live[0].Accepted || live[0].Received != 3 || live[0].Sent != 3 {
			t.Errorf("%+v, %v", live, err)
		}
	})
}
