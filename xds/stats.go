package xds

import "sync/atomic"

// Termination says how a stream, or the attempt to open one, ended.
type Termination uint8

const (
	ConnectionError Termination = iota // The stream could not be opened.
	Error                              // The server failed it, or we could not ask.
	Reconnect                          // An ordinary end of the connection.
	Complete                           // The server ended the stream without an error.

	terminations = iota
)

// String is the value of the metric's label.
func (t Termination) String() string {
	return [terminations]string{"ConnectionError", "Error", "Reconnect", "Complete"}[t]
}

// Stats are counters since New. Maps are the caller's own.
type Stats struct {
	Connected    bool
	Terminations map[string]uint64    // By Termination.
	Types        map[string]TypeStats // By type URL.
	UnknownTypes uint64               // Responses of types that were not asked for.
}

// TypeStats are the counters of one type.
type TypeStats struct {
	Messages uint64 // Responses.
	Bytes    uint64 // Of the resources in them.
	Rejected uint64 // Resources.
	Known    int    // Resources held now.
}

type counters struct {
	connected    atomic.Bool
	unknown      atomic.Uint64
	terminations [terminations]atomic.Uint64
}

type typeCounters struct {
	messages, bytes, rejected atomic.Uint64
	known                     atomic.Int64
}

// Stats returns the counters as they are now.
func (c *Client) Stats() Stats {
	s := Stats{
		Connected:    c.counters.connected.Load(),
		Terminations: make(map[string]uint64, terminations),
		Types:        make(map[string]TypeStats, len(c.subs)),
		UnknownTypes: c.counters.unknown.Load(),
	}
	for i := range c.counters.terminations {
		s.Terminations[Termination(i).String()] = c.counters.terminations[i].Load()
	}
	for _, sub := range c.subs {
		s.Types[sub.Type] = TypeStats{
			Messages: sub.counters.messages.Load(),
			Bytes:    sub.counters.bytes.Load(),
			Rejected: sub.counters.rejected.Load(),
			Known:    int(sub.counters.known.Load()),
		}
	}
	return s
}
