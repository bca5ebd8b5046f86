package h2

import "time"

// A Limit names what a peer overdid. It is the value of a metric label.
type Limit string

// The limits. Each ends the connection, with ENHANCE_YOUR_CALM.
const (
	LimitResets        Limit = "rapid_reset"   // streams reset before they were answered, or for the peer's faults
	LimitRefused       Limit = "refused"       // streams opened beyond MAX_CONCURRENT_STREAMS
	LimitBadRequests   Limit = "bad_request"   // requests that are no valid CONNECT
	LimitSettings      Limit = "settings"      // SETTINGS frames
	LimitPings         Limit = "ping"          // PING frames
	LimitEmptyData     Limit = "empty_data"    // DATA without data
	LimitWindowUpdates Limit = "window_update" // WINDOW_UPDATE beyond what was sent
	LimitTinyWindows   Limit = "tiny_window"   // a used-up window opened by a few bytes
	LimitIgnored       Limit = "ignored"       // PRIORITY, unknown and other frames without effect
	LimitContinuations Limit = "continuation"  // CONTINUATION frames of one header block
	LimitHeaderBlock   Limit = "header_block"  // bytes of one header block
	LimitReplies       Limit = "replies"       // control frames queued for a peer that does not read
)

// Limits bound what a peer may do in ten seconds, unless they say otherwise.
// A zero field means its default.
type Limits struct {
	Resets         int // 1000
	Refused        int // 1000
	BadRequests    int // 1000
	Settings       int // 100
	Pings          int // 1000
	EmptyData      int // 1000
	WindowUpdates  int // 2000, and four for every DATA frame sent
	TinyWindows    int // 1000
	Ignored        int // 2000
	Continuations  int // 16 for each header block
	QueuedControls int // 128 KiB of unsent control frames
}

const (
	limitPeriod = 10 * time.Second
	// A window that opens to less than tinyWindow makes frames whose head and
	// handling cost more than what they carry.
	tinyWindow = 128
	// blockFactor times Config.MaxHeaderList is the longest header block that
	// is still decoded, in order to be answered 431.
	blockFactor = 2
)

func (l Limits) withDefaults() Limits {
	def(&l.Resets, 1000)
	def(&l.Refused, 1000)
	def(&l.BadRequests, 1000)
	def(&l.Settings, 100)
	def(&l.Pings, 1000)
	def(&l.EmptyData, 1000)
	def(&l.WindowUpdates, 2000)
	def(&l.TinyWindows, 1000)
	def(&l.Ignored, 2000)
	def(&l.Continuations, 16)
	def(&l.QueuedControls, 128<<10)
	return l
}

// rate counts events; the clock is read once for each limit of them.
type rate struct {
	n     int
	start time.Time
}

// over reports whether more than limit events came within limitPeriod. The
// period begins anew whenever that many came in a longer time.
func (r *rate) over(limit int) bool {
	if r.start.IsZero() {
		r.start = time.Now()
	}
	r.n++
	if r.n <= limit {
		return false
	}
	now := time.Now()
	if now.Sub(r.start) < limitPeriod {
		return true
	}
	r.n, r.start = 0, now
	return false
}

// abuse is what a peer has done so far.
type abuse struct {
	limits Limits
	resets, refused, badRequests, settings, pings, emptyData,
	windowUpdates, tinyWindows, ignored rate

	// late is how many bytes may still arrive on streams that we reset.
	late int64
}

func (a *abuse) rate(l Limit) (*rate, int) {
	switch l {
	case LimitResets:
		return &a.resets, a.limits.Resets
	case LimitRefused:
		return &a.refused, a.limits.Refused
	case LimitBadRequests:
		return &a.badRequests, a.limits.BadRequests
	case LimitSettings:
		return &a.settings, a.limits.Settings
	case LimitPings:
		return &a.pings, a.limits.Pings
	case LimitEmptyData:
		return &a.emptyData, a.limits.EmptyData
	case LimitWindowUpdates:
		return &a.windowUpdates, a.limits.WindowUpdates
	case LimitTinyWindows:
		return &a.tinyWindows, a.limits.TinyWindows
	}
	return &a.ignored, a.limits.Ignored
}

// tooMany counts an event and reports whether it ended the connection.
func (c *Conn) tooMany(l Limit) bool {
	r, limit := c.abuse.rate(l)
	if !r.over(limit) {
		return false
	}
	c.overLimit(l)
	return true
}

func (c *Conn) overLimit(l Limit) {
	c.fail(&ConnError{Code: CodeEnhanceYourCalm, Limit: l, Detail: "too many or too much: " + string(l)})
}

// ignored counts a frame without effect.
func (c *Conn) ignored() {
	c.stats.FramesIgnored++
	c.tooMany(LimitIgnored)
}

// lateFrameCost is what a frame without payload costs on a stream that we
// reset; maxLate bounds what resets allow.
const (
	lateFrameCost = 64
	lateAllowance = 4 << 10
	maxLate       = 1 << 30
)

// expectLate allows for what the peer may have under way on a stream that we
// reset.
func (c *Conn) expectLate(window int64) {
	c.abuse.late = min(c.abuse.late+max(window, 0)+lateAllowance, maxLate)
}

// isLate reports whether a frame with n bytes on a closed stream can be one
// that crossed our RST_STREAM. A window may be on its way in frames of a byte
// each, so DATA costs no more than it carries.
func (c *Conn) isLate(n int) bool {
	if n == 0 {
		n = lateFrameCost
	}
	c.abuse.late -= int64(n)
	return c.abuse.late >= 0
}
