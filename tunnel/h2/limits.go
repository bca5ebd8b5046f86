package h2

// A Limit names what a peer overdid. It is the value of a metric label.
type Limit string

// The limits. Each ends the connection, with ENHANCE_YOUR_CALM.
const (
	LimitResets        Limit = "rapid_reset"   // streams reset before they were answered, or by the peer's own faults
	LimitRefused       Limit = "refused"       // streams opened beyond MAX_CONCURRENT_STREAMS
	LimitSettings      Limit = "settings"      // SETTINGS frames
	LimitPings         Limit = "ping"          // PING frames
	LimitEmptyData     Limit = "empty_data"    // DATA without data
	LimitWindowUpdates Limit = "window_update" // WINDOW_UPDATE beyond what was sent
	LimitTinyWindows   Limit = "tiny_window"   // a blocked stream's window opened by a few bytes
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
	Settings       int // 100
	Pings          int // 1000
	EmptyData      int // 1000
	WindowUpdates  int // 2000, and four for every DATA frame sent
	TinyWindows    int // 1000
	Ignored        int // 2000
	Continuations  int // 16 for each header block
	QueuedControls int // 128 KiB of unsent control frames
}
