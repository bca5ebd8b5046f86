package netstack

import (
	"testing"
	"time"
)

// A Flow's buffers grow by what comes at once, in however small pieces it is
// read.
func TestWindowGrowsWhateverIsReadAtOnce(t *testing.T) {
	r := newRig(t, StackConfig{})
	accept, ch := accepting(t, r.proxy)
	on(r.proxy, r.onProxy, func(h *hooks) { h.tcp = accept })
	c, err := dialOn(t, r.kernel, podPort, service, patience)
	if err != nil {
		t.Fatal(err)
	}
	far := <-ch
	// The kernel's side always has more to send.
	buf := make([]byte, 64<<10)
	push := func() {
		for {
			if _, err := c.end.Write(buf); err != nil {
				return
			}
		}
	}
	c.loop.Post(func() { c.end.Notify(push) })
	size := func() int64 { return do(r.proxy.Loop(), func() int64 { return far.end.(*Flow).size }) }
	piece := make([]byte, 4<<10)
	for end := time.Now().Add(patience); size() < maxBuffer; {
		if time.Now().After(end) {
			t.Fatalf("the buffers have %d bytes, want %d", size(), maxBuffer)
		}
		do(r.proxy.Loop(), func() int {
			for {
				if _, err := far.end.Read(piece); err != nil {
					return 0
				}
			}
		})
	}
	far.Reset()
}
