package h2

import "time"

// Defaults of Config: what stock ztunnel announces, except InitialWindow,
// which starts small and grows while a stream drains.
const (
	DefaultInitialWindow       = 256 << 10
	DefaultMaxWindow           = 4 << 20
	DefaultConnWindow          = 16 << 20
	DefaultMaxFrameSize        = 1 << 20
	DefaultClientMaxHeaderList = 16 << 10
	DefaultServerMaxHeaderList = 64 << 10
	DefaultClientMaxStreams    = 100
	DefaultServerMaxStreams    = 200
	DefaultPingEvery           = 10 * time.Second
	DefaultPingTimeout         = 20 * time.Second
	DefaultSetupTimeout        = 10 * time.Second
)

// Config says how a Conn behaves. New copies it. A zero field means its
// default.
type Config struct {
	// Client makes the Conn open streams; else it accepts them.
	Client bool

	// InitialWindow is SETTINGS_INITIAL_WINDOW_SIZE in bytes, and MaxWindow
	// what the window of a stream that drains fast grows to.
	InitialWindow, MaxWindow uint32
	// ConnWindow is the window of the connection in bytes. It bounds what all
	// streams together keep unread, and is never below MaxWindow.
	ConnWindow uint32
	// MaxFrameSize is SETTINGS_MAX_FRAME_SIZE in bytes.
	MaxFrameSize uint32
	// MaxHeaderList is SETTINGS_MAX_HEADER_LIST_SIZE in bytes.
	MaxHeaderList uint32
	// MaxStreams is SETTINGS_MAX_CONCURRENT_STREAMS of a server. A client
	// opens at most that many, or what the peer announced if that is less.
	MaxStreams uint32

	// PingEvery is the time from the start, or from the last answer, to the
	// next PING; without a sign of life for PingTimeout the connection ends.
	// PingEvery < 0 sends none.
	PingEvery, PingTimeout time.Duration
	// SetupTimeout bounds the wait for the peer's preface and SETTINGS, and
	// for its acknowledgement of ours.
	SetupTimeout time.Duration

	// Limits bound what a hostile peer can cost.
	Limits Limits

	// OnStream hands a server each CONNECT. It or something later must call
	// Respond, Reset or Close on the stream.
	OnStream func(s *Stream, r Request)
	// OnGoAway runs once, when the peer announces that it takes no more
	// streams.
	OnGoAway func()
	// OnClose runs once, when the Conn has ended and every stream with it:
	// nil after a graceful end, else the cause.
	OnClose func(err error)
}

func (cfg *Config) withDefaults() Config {
	c := *cfg
	def(&c.InitialWindow, DefaultInitialWindow)
	def(&c.MaxWindow, DefaultMaxWindow)
	def(&c.ConnWindow, DefaultConnWindow)
	def(&c.MaxFrameSize, DefaultMaxFrameSize)
	if c.Client {
		def(&c.MaxHeaderList, DefaultClientMaxHeaderList)
		def(&c.MaxStreams, DefaultClientMaxStreams)
	} else {
		def(&c.MaxHeaderList, DefaultServerMaxHeaderList)
		def(&c.MaxStreams, DefaultServerMaxStreams)
	}
	def(&c.PingEvery, DefaultPingEvery)
	def(&c.PingTimeout, DefaultPingTimeout)
	def(&c.SetupTimeout, DefaultSetupTimeout)
	c.Limits = c.Limits.withDefaults()

	// A peer may use the protocol's defaults until it has read our SETTINGS.
	c.InitialWindow = min(max(c.InitialWindow, initialWindow), maxWindow)
	c.MaxWindow = min(max(c.MaxWindow, c.InitialWindow), maxWindow)
	c.ConnWindow = min(max(c.ConnWindow, c.MaxWindow), maxWindow)
	c.MaxFrameSize = min(max(c.MaxFrameSize, minMaxFrameSize), maxMaxFrameSize)
	return c
}

func def[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}
