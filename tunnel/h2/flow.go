package h2

import "time"

// fastDrain is the time within which a whole window must have been taken for
// it to be doubled, or twice the round trip where that is longer: a window of
// what is taken in this time never holds the peer up.
const fastDrain = 100 * time.Millisecond

// recvFlow is a receive window. It starts small, doubles while it drains fast
// and halves when what arrives is left lying.
type recvFlow struct {
	win          int64 // what the peer may still send
	size         int64 // what win is brought up to
	initial, max int64
	taken        int64 // taken by the user, not yet given back to the peer

	since   time.Time // when the measured window began
	drained int64     // taken since then
	slow    bool      // something was left lying
}

// take notes that n bytes were taken and returns the increment to announce, 0
// for none yet: updates are batched to a quarter of the window.
func (f *recvFlow) take(n int, rtt time.Duration) (increment int64) {
	f.taken += int64(n)
	if f.taken < f.size/4 {
		return 0
	}
	f.drained += f.taken
	f.adapt(rtt)
	increment, f.taken = f.taken, 0
	f.win += increment
	return increment
}

// adapt grows or shrinks the window by changing what is given back.
func (f *recvFlow) adapt(rtt time.Duration) {
	if f.initial == f.max {
		return
	}
	if f.slow {
		less := min(f.size-max(f.initial, f.size/2), f.taken)
		f.size -= less
		f.taken -= less
		f.slow = false
		f.since, f.drained = time.Time{}, 0
		return
	}
	if f.drained < f.size {
		return
	}
	now := time.Now()
	if !f.since.IsZero() && now.Sub(f.since) < max(fastDrain, 2*rtt) {
		more := min(2*f.size, f.max) - f.size
		f.size += more
		f.taken += more
	}
	f.since, f.drained = now, 0
}

// credit gives n bytes back to the connection's window.
func (c *Conn) credit(n int) {
	if n == 0 || c.state != stateOpen {
		return
	}
	if inc := c.recv.take(n, 0); inc > 0 {
		c.check(c.hdrs.wr.WriteWindowUpdate(0, uint32(inc)))
	}
}

// onWindowUpdate handles a whole WINDOW_UPDATE frame.
func (c *Conn) onWindowUpdate(f frameHead, p []byte) {
	if len(p) != 4 {
		c.fail(&ConnError{Code: CodeFrameSize, Detail: "window update length"})
		return
	}
	if c.tooMany(LimitWindowUpdates) {
		return
	}
	inc := int64(be32(p) & maxWindow)
	if f.id == 0 {
		c.openWindow(inc)
		return
	}
	s := c.streams[f.id]
	if s == nil {
		c.onOtherStream(f, 0)
		return
	}
	switch {
	case inc == 0:
		s.fault(CodeProtocol, "window update of 0")
	case s.send+inc > maxWindow:
		s.fault(CodeFlowControl, "window overflow")
	default:
		if s.windowBlocked && s.send+inc < tinyWindow && c.tooMany(LimitTinyWindows) {
			return
		}
		s.send += inc
		s.windowOpened()
	}
}

func (c *Conn) openWindow(inc int64) {
	switch {
	case inc == 0:
		c.fail(&ConnError{Code: CodeProtocol, Detail: "window update of 0"})
	case c.send+inc > maxWindow:
		c.fail(&ConnError{Code: CodeFlowControl, Detail: "window overflow"})
	default:
		if c.send <= 0 && c.send+inc < tinyWindow && c.tooMany(LimitTinyWindows) {
			return
		}
		c.send += inc
		c.wakeWriters()
	}
}
