package wire

import (
	"bytes"
	"net/netip"
)

// Ports whose payload is TLS by design: the mesh's tunnels, and the control
// plane.
const (
	tunnelPort  = 15008
	controlPort = 15012
)

// Seen is what a tap has counted since it was last reset.
type Seen struct {
	// Segments are TCP segments with payload.
	Segments int `json:"segments"`
	// Tunnel are those from or to port 15008; Handshakes and Records the TLS
	// handshake and application data records that begin one of them.
	Tunnel     int `json:"tunnel"`
	Handshakes int `json:"handshakes"`
	Records    int `json:"records"`
	// Clear are segments with payload that are neither from or to a tunnel nor
	// the control plane; ClearExample is one of them.
	Clear        int    `json:"clear"`
	ClearExample string `json:"clearExample,omitempty"`
	// Words counts the segments that carried each word that was looked for.
	Words map[string]int `json:"words"`
}

// A tap counts what goes by. It is not safe for concurrent use.
type tap struct {
	words [][]byte
	seen  Seen
}

func newTap(words []string) *tap {
	t := &tap{}
	for _, w := range words {
		t.words = append(t.words, []byte(w))
	}
	t.reset()
	return t
}

func (t *tap) reset() {
	t.seen = Seen{Words: map[string]int{}}
	for _, w := range t.words {
		t.seen.Words[string(w)] = 0
	}
}

// frame counts one Ethernet frame. Words are looked for in all of it,
// whatever it is.
func (t *tap) frame(frame []byte) {
	for _, w := range t.words {
		if bytes.Contains(frame, w) {
			t.seen.Words[string(w)]++
		}
	}
	s, ok := parseFrame(frame)
	if !ok || len(s.payload) == 0 {
		return
	}
	t.seen.Segments++
	is := func(port uint16) bool { return s.src.Port() == port || s.dst.Port() == port }
	switch {
	case is(tunnelPort):
		t.seen.Tunnel++
		switch kind, ok := tlsRecord(s.payload); {
		case ok && kind == 22:
			t.seen.Handshakes++
		case ok && kind == 23:
			t.seen.Records++
		}
	case !is(controlPort):
		t.seen.Clear++
		t.seen.ClearExample = flow(s.src, s.dst)
	}
}

func flow(src, dst netip.AddrPort) string { return src.String() + " > " + dst.String() }
