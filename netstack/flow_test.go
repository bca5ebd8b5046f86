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
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		buf := make([]byte, 64<<10)
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := c.Write(buf); err != nil {
					return
				}
			}
		}
	}()
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
