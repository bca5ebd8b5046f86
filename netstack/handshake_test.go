package netstack

import (
	"net/netip"
	"testing"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tunnel/splice"
)

// What comes back of a SYN that was sent twice says nothing of the round trip:
// gVisor's second has the timestamp of the first.
func TestRepeatedHandshakeIsNoSample(t *testing.T) {
	src, dst := client, netip.AddrPortFrom(pod, 80)
	check := func(t *testing.T, r *rawRig, f *Flow, seq, ack uint32) {
		t.Helper()
		i := do(r.stack.Loop(), f.info)
		if i.RTT != 0 || i.RTO != noSampleRTO {
			t.Errorf("RTT %v, RTO %v, want none and %v", i.RTT, i.RTO, noSampleRTO)
		}
		r.stack.Loop().Post(func() { f.Write([]byte("hello")) })
		b, _ := r.read()
		r.write(tun.Header{}, segmentWith(timestamps(false, 3, optionsOf(b).TSVal), f.Remote(), f.Local(), flagACK, seq, ack+5, nil))
		r.sync()
		if i := do(r.stack.Loop(), f.info); i.RTT == 0 || i.RTO >= noSampleRTO {
			t.Errorf("RTT %v, RTO %v after the first sample", i.RTT, i.RTO)
		}
	}
	// twice returns the second packet of two that are the same.
	twice := func(t *testing.T, r *rawRig, flags uint8) (seq, stamp uint32) {
		t.Helper()
		for range 2 {
			b, _ := r.read()
			if flagsOf(b) != flags {
				t.Fatalf("flags %#x, want %#x", flagsOf(b), flags)
			}
			seq, stamp = seqOf(b), optionsOf(b).TSVal
		}
		return seq, stamp
	}
	t.Run("accept", func(t *testing.T) {
		r := newRawRig(t, StackConfig{})
		accept, ch := accepting(t, r.stack)
		on(r.stack, r.handler, func(h *hooks) { h.tcp = accept })
		r.write(tun.Header{}, segmentWith(timestamps(true, 1, 0), src, dst, flagSYN, 100, 0, nil))
		seq, stamp := twice(t, r, flagSYN|flagACK)
		r.write(tun.Header{}, segmentWith(timestamps(false, 2, stamp), src, dst, flagACK, 101, seq+1, nil))
		check(t, r, (<-ch).end.(*Flow), 101, seq+1)
	})
	t.Run("dial", func(t *testing.T) {
		r := newRawRig(t, StackConfig{})
		ch := make(chan splice.End, 1)
		own := netip.AddrPortFrom(pod, 50000)
		r.stack.Loop().Post(func() {
			r.stack.Dial(own, src, patience, func(e splice.End, err error) {
				if err != nil {
					t.Error(err)
				}
				ch <- e
			})
		})
		seq, stamp := twice(t, r, flagSYN)
		r.write(tun.Header{}, segmentWith(timestamps(true, 2, stamp), src, own, flagSYN|flagACK, 100, seq+1, nil))
		r.read() // the ACK
		check(t, r, (<-ch).(*Flow), 101, seq+1)
	})
	t.Run("tunnel", func(t *testing.T) {
		r := newRawRig(t, StackConfig{})
		ch := make(chan *Flow, 1)
		on(r.stack, r.handler, func(h *hooks) {
			h.tunnel = func(e splice.End, _, _ netip.AddrPort) { ch <- e.(*Flow) }
		})
		own := netip.AddrPortFrom(pod, TunnelPort)
		r.write(tun.Header{}, segmentWith(timestamps(true, 1, 0), src, own, flagSYN, 100, 0, nil))
		seq, stamp := twice(t, r, flagSYN|flagACK)
		r.write(tun.Header{}, segmentWith(timestamps(false, 2, stamp), src, own, flagACK, 101, seq+1, nil))
		check(t, r, <-ch, 101, seq+1)
	})
}
