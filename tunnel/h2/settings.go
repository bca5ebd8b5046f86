package h2

import (
	"time"

	"golang.org/x/net/http2"
)

// https://www.rfc-editor.org/rfc/rfc9113#section-6.5.2
const (
	initialWindow   = 65535
	maxWindow       = 1<<31 - 1
	minMaxFrameSize = 1 << 14
	maxMaxFrameSize = 1<<24 - 1
	headerTableSize = 4096
	// maxSettings bounds the parameters of one SETTINGS frame; there are
	// about ten.
	maxSettings = 100
)

type peerSettings struct {
	window        int64 // of new streams, for us to send
	maxFrame      uint32
	maxStreams    uint32 // that we may open
	maxHeaderList uint32
}

var defaultPeerSettings = peerSettings{
	window:        initialWindow,
	maxFrame:      minMaxFrameSize,
	maxStreams:    1<<32 - 1,
	maxHeaderList: 1<<32 - 1,
}

// settings are ours, in the order in which a stock ztunnel sends its own.
func (cfg *Config) settings() []http2.Setting {
	first := http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: cfg.MaxStreams}
	if cfg.Client {
		first = http2.Setting{ID: http2.SettingEnablePush, Val: 0}
	}
	return []http2.Setting{
		first,
		{ID: http2.SettingInitialWindowSize, Val: cfg.InitialWindow},
		{ID: http2.SettingMaxFrameSize, Val: cfg.MaxFrameSize},
		{ID: http2.SettingMaxHeaderListSize, Val: cfg.MaxHeaderList},
	}
}

// onSettings handles a whole SETTINGS frame.
func (c *Conn) onSettings(f frameHead, p []byte) {
	if f.flags.Has(http2.FlagSettingsAck) {
		c.onSettingsAck(p)
		return
	}
	// "A SETTINGS frame with a length other than a multiple of 6 octets MUST
	// be treated as a connection error of type FRAME_SIZE_ERROR."
	if len(p)%6 != 0 {
		c.fail(&ConnError{Code: CodeFrameSize, Detail: "settings length"})
		return
	}
	if c.setup.gotSettings && c.tooMany(LimitSettings) {
		return
	}
	for ; len(p) > 0; p = p[6:] {
		id := http2.SettingID(uint16(p[0])<<8 | uint16(p[1]))
		if !c.applySetting(http2.Setting{ID: id, Val: be32(p[2:])}) {
			return
		}
	}
	c.setup.gotSettings = true
	c.check(c.hdrs.wr.WriteSettingsAck())
	c.setupDone()
}

func (c *Conn) onSettingsAck(p []byte) {
	if len(p) != 0 {
		c.fail(&ConnError{Code: CodeFrameSize, Detail: "settings ack with payload"})
		return
	}
	if c.setup.gotAck {
		c.ignored()
		return
	}
	c.setup.gotAck = true
	c.ping.measured(time.Since(c.setup.sentAt))
	c.setupDone()
}

func (c *Conn) setupDone() {
	if c.setup.gotSettings && c.setup.gotAck {
		c.setup.end()
	}
}

// applySetting reports whether the connection lives on.
func (c *Conn) applySetting(s http2.Setting) bool {
	switch s.ID {
	case http2.SettingHeaderTableSize:
		size := min(s.Val, headerTableSize)
		c.hdrs.enc.SetMaxDynamicTableSizeLimit(size)
		c.hdrs.enc.SetMaxDynamicTableSize(size)
	case http2.SettingEnablePush:
		// "A client MUST treat receipt of a SETTINGS frame with
		// SETTINGS_ENABLE_PUSH set to 1 as a connection error".
		if s.Val > 1 || s.Val == 1 && c.cfg.Client {
			c.fail(&ConnError{Code: CodeProtocol, Detail: "bad ENABLE_PUSH"})
			return false
		}
	case http2.SettingMaxConcurrentStreams:
		c.peer.maxStreams = s.Val
	case http2.SettingInitialWindowSize:
		if s.Val > maxWindow {
			c.fail(&ConnError{Code: CodeFlowControl, Detail: "bad INITIAL_WINDOW_SIZE"})
			return false
		}
		return c.shiftWindows(int64(s.Val))
	case http2.SettingMaxFrameSize:
		if s.Val < minMaxFrameSize || s.Val > maxMaxFrameSize {
			c.fail(&ConnError{Code: CodeProtocol, Detail: "bad MAX_FRAME_SIZE"})
			return false
		}
		c.peer.maxFrame = s.Val
	case http2.SettingMaxHeaderListSize:
		c.peer.maxHeaderList = s.Val
	}
	return true
}

// shiftWindows applies a new INITIAL_WINDOW_SIZE to the open streams, whose
// windows may become negative by it (RFC 9113 section 6.9.2).
func (c *Conn) shiftWindows(window int64) bool {
	delta := window - c.peer.window
	c.peer.window = window
	if delta == 0 {
		return true
	}
	for _, s := range c.streams {
		if s.send+delta > maxWindow {
			c.fail(&ConnError{Code: CodeFlowControl, Detail: "window overflow by settings"})
			return false
		}
		s.send += delta
		s.windowOpened()
	}
	return true
}
