package standin

import (
	"net/netip"
	"testing"
	"time"
)

type step struct {
	name     string
	src, dst netip.AddrPort
	flags    byte
	want     verdict
}

// run says yes to every question.
func (t *table) run(tt *testing.T, now time.Time, steps []step) {
	tt.Helper()
	for _, s := range steps {
		got, k := t.decide(&packet{s.src, s.dst, s.flags}, now)
		if got != s.want {
			tt.Errorf("%s: %v, want %v", s.name, got, s.want)
		}
		if got == ask {
			t.asked[k] = struct{}{}
			t.answered(k, true, now)
		}
	}
}

func newTestTable() *table {
	return newTable([]netip.Addr{pod4, netip.AddrFrom16(pod4.As16()), pod6}, []netip.Addr{node4, node6})
}

func TestOnlyWhatBeganAsAProbePasses(t *testing.T) {
	at := func(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
	now := time.Unix(1e9, 0)
	newTestTable().run(t, now, []step{
		{"answer to nothing", app, probe, flagSYN | flagACK, drop},
		{"middle of nothing", probe, app, flagACK, drop},
		{"reset of nothing", app, probe, flagRST, drop},
		{"stranger's SYN", at(far4, 1), app, flagSYN, drop},
		{"SYN to a stranger", probe, at(far4, 80), flagSYN, drop},
		{"pod's SYN to the node", app, probe, flagSYN, drop},
		{"pod to itself", app, at(pod4, 9), flagSYN, drop},
		{"node to itself", probe, at(node4, 9), flagSYN, drop},
		{"tunnel", probe, at(pod4, tunnelPort), flagSYN, drop},
		{"SYN with RST", probe, app, flagSYN | flagRST, drop},
		{"probe", probe, app, flagSYN, ask},
		{"SYN-ACK", app, probe, flagSYN | flagACK, pass},
		{"request", probe, app, flagACK, pass},
		{"another port of the node", at(node4, 40001), app, flagACK, drop},
		{"another port of the pod", probe, at(pod4, 8081), flagACK, drop},
		{"another family", probe6, app6, flagACK, drop},
		{"pod's FIN", app, probe, flagFIN | flagACK, pass},
		{"node's FIN", probe, app, flagFIN | flagACK, pass},
		{"last ACK", app, probe, flagACK, pass},
		{"the tuple again", probe, app, flagSYN, ask},
		{"pod's SYN on it", app, probe, flagSYN, drop},
		{"refused", app, probe, flagRST | flagACK, pass},
		{"after the reset", probe, app, flagACK, drop},
		{"probe of IPv6", probe6, app6, flagSYN, ask},
		{"its answer", app6, probe6, flagSYN | flagACK, pass},
	})
}

func TestProbesEnd(t *testing.T) {
	now := time.Unix(1e9, 0)
	open := []step{{"probe", probe, app, flagSYN, ask}, {"SYN-ACK", app, probe, flagSYN | flagACK, pass}}
	for _, tt := range []struct {
		name   string
		before []step
		after  time.Duration
		want   verdict
	}{
		{"silent", nil, idle, pass},
		{"silent for long", nil, idle + 1, drop},
		{"one FIN", []step{{"", app, probe, flagFIN, pass}}, linger + 1, pass},
		{"FIN twice", []step{{"", app, probe, flagFIN, pass}, {"", app, probe, flagFIN, pass}}, linger + 1, pass},
		{"both FINs", []step{{"", app, probe, flagFIN, pass}, {"", probe, app, flagFIN, pass}}, linger, pass},
		{"both FINs long ago", []step{{"", app, probe, flagFIN, pass}, {"", probe, app, flagFIN, pass}}, linger + 1, drop},
	} {
		tb := newTestTable()
		tb.run(t, now, append(open, tt.before...))
		tb.sweep(now.Add(tt.after))
		if got := len(tb.flows) == 1; got != (tt.want == pass) {
			t.Errorf("%s: kept by a sweep: %v", tt.name, got)
		}
		tb = newTestTable()
		tb.run(t, now, append(open, tt.before...))
		tb.run(t, now.Add(tt.after), []step{{tt.name, probe, app, flagACK, tt.want}})
	}
}

func TestTableIsBounded(t *testing.T) {
	tb, now := newTestTable(), time.Unix(1e9, 0)
	at := func(i int) key { return key{netip.AddrPortFrom(node4, uint16(i+1)), app} }
	for i := range maxFlows {
		if !tb.answered(at(i), true, now) {
			t.Fatalf("no room for flow %d", i)
		}
	}
	if tb.answered(at(maxFlows), true, now) || len(tb.flows) != maxFlows {
		t.Errorf("%d flows", len(tb.flows))
	}
	if !tb.answered(at(maxFlows), true, now.Add(idle+1)) || len(tb.flows) != 1 {
		t.Errorf("%d flows after the others ended", len(tb.flows))
	}
	if tb.answered(at(0), false, now) {
		t.Error("a connection that is no probe was noted")
	}
}

func TestHeldSYNIsAskedAboutOnce(t *testing.T) {
	tb, now := newTestTable(), time.Unix(1e9, 0)
	v, k := tb.decide(&packet{probe, app, flagSYN}, now)
	if v != ask {
		t.Fatal(v)
	}
	tb.asked[k] = struct{}{}
	if v, _ := tb.decide(&packet{probe, app, flagSYN}, now); v != drop {
		t.Errorf("repeated: %v", v)
	}
	tb.answered(k, true, now)
	// A new connection on the tuple of a probe has to be one itself.
	if v, _ := tb.decide(&packet{probe, app, flagSYN}, now); v != ask {
		t.Errorf("on a probe's tuple: %v", v)
	}
	tb.answered(k, false, now)
	if v, _ := tb.decide(&packet{app, probe, flagSYN | flagACK}, now); v != drop {
		t.Errorf("the answer to what is no probe: %v", v)
	}
	if v, _ := tb.decide(&packet{probe, app, flagSYN}, now); v != ask {
		t.Errorf("after the answer: %v", v)
	}
}

func TestParsePacket(t *testing.T) {
	edit := func(b []byte, at int, v byte) []byte { b[at] = v; return b }
	for _, tt := range []struct {
		name string
		b    []byte
		ok   bool
	}{
		{"IPv4", segment(probe, app, flagSYN, ""), true},
		{"IPv6", segment(probe6, app6, flagSYN, "data"), true},
		{"nothing", nil, false},
		{"short", segment(probe, app, flagSYN, "")[:39], false},
		{"short IPv6", segment(probe6, app6, flagSYN, "")[:59], false},
		{"longer than it says", append(segment(probe, app, flagSYN, ""), 0), false},
		{"IPv6 longer than it says", append(segment(probe6, app6, flagSYN, ""), 0), false},
		{"options", edit(segment(probe, app, flagSYN, "data"), 0, 0x46), false},
		{"first fragment", edit(segment(probe, app, flagSYN, ""), 6, 0x20), false},
		{"last fragment", edit(segment(probe, app, flagSYN, ""), 7, 1), false},
		{"do not fragment", edit(segment(probe, app, flagSYN, ""), 6, 0x40), true},
		{"UDP", edit(segment(probe, app, flagSYN, ""), 9, 17), false},
		{"IPv6 fragment", edit(segment(probe6, app6, flagSYN, ""), 6, 44), false},
		{"mapped", segment(netip.AddrPortFrom(netip.AddrFrom16(node4.As16()), 1), app6, flagSYN, ""), false},
		{"TCP header too short", edit(segment(probe, app, flagSYN, ""), 32, 4<<4), false},
		{"TCP header too long", edit(segment(probe, app, flagSYN, ""), 32, 6<<4), false},
		{"version 5", edit(segment(probe, app, flagSYN, ""), 0, 0x55), false},
	} {
		p, ok := parsePacket(tt.b)
		if ok != tt.ok {
			t.Errorf("%s: %+v, %v, want %v", tt.name, p, ok, tt.ok)
		}
	}
	if p, _ := parsePacket(segment(probe6, app6, flagSYN|flagACK, "x")); p != (packet{probe6, app6, flagSYN | flagACK}) {
		t.Errorf("parsed %+v", p)
	}
}

// FuzzPacket: what is taken for a segment says the same when it is made again.
func FuzzPacket(f *testing.F) {
	f.Add(segment(probe, app, flagSYN, ""))
	f.Add(segment(probe6, app6, flagACK, "data"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, ok := parsePacket(b)
		if !ok {
			return
		}
		if again, ok := parsePacket(segment(p.src, p.dst, p.flags, "")); !ok || again != p {
			t.Fatalf("%+v became %+v, %v", p, again, ok)
		}
		newTestTable().decide(&p, time.Unix(1e9, 0))
	})
}
