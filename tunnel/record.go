package tunnel

import (
	"net/netip"
	"strings"
	"time"

	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/mesh"
)

// Direction is a connection's as seen from the pod.
type Direction uint8

// The directions.
const (
	Outbound Direction = iota
	Inbound
)

// String is the access log's direction.
func (d Direction) String() string {
	if d == Inbound {
		return "inbound"
	}
	return "outbound"
}

// A Record is what there is to tell of one connection. The fields above
// Duration are set before it is first handed out; of these only DstIdentity may
// change, once the peer has proven another of those it may have. The fields
// from Duration on are set before Closed or Failed, Sent and Received before
// Progress as well.
type Record struct {
	Direction Direction
	// Hairpin says that the pod reached itself through a service, in memory.
	Hairpin bool
	Start   time.Time
	Trace   hbone.Trace

	// Src is the client. Dst is what was dialled or, inbound, what the client
	// dialled: with a tunnel that is port 15008.
	Src, Dst netip.AddrPort
	// HBONEAddr is the authority of the CONNECT; "" without a tunnel.
	HBONEAddr string
	// SrcWorkload and DstWorkload are nil where the mesh does not know them.
	SrcWorkload, DstWorkload *mesh.Workload
	// Service is the one the client addressed, as far as it is known.
	Service *mesh.Service
	// SrcIdentity and DstIdentity are zero without mutual TLS.
	SrcIdentity, DstIdentity identity.ID
	// SrcBaggage is what the client says of itself; nil if that is nothing, or if
	// the mesh knows SrcWorkload, and so knows better.
	SrcBaggage *hbone.Baggage

	Duration time.Duration
	// Sent and Received are in bytes and from this pod's view: outbound, Sent
	// went from the app to the peer; inbound, Sent is the app's answer.
	Sent, Received uint64
	// SameNode says that the stream was handed over in memory between two pods
	// of this process.
	SameNode bool
	Reason   Reason
	Err      error // detail to Reason, or nil

	// Slot is the Recorder's own, from Opened to Closed.
	Slot any
	told [2]uint64 // of Request and Response, by Untold
}

// MutualTLS reports whether both identities are proven.
func (r *Record) MutualTLS() bool { return r.HBONEAddr != "" && !r.SrcIdentity.IsZero() }

// Request returns the bytes that went from the client to the server, and
// Response those that came back, as the metrics count them.
func (r *Record) Request() uint64 {
	if r.Direction == Outbound {
		return r.Sent
	}
	return r.Received
}

// Response returns the bytes that went from the server to the client.
func (r *Record) Response() uint64 {
	if r.Direction == Outbound {
		return r.Received
	}
	return r.Sent
}

// Untold returns how much Request and Response have grown since it was last
// called for this connection. It is for the Recorder.
func (r *Record) Untold() (request, response uint64) {
	now := [2]uint64{r.Request(), r.Response()}
	for i, n := range now {
		now[i] -= min(n, r.told[i])
		r.told[i] = n
	}
	return now[0], now[1]
}

// Error returns the access log's error: the reason, with its detail where that
// says more, or "".
func (r *Record) Error() string {
	if r.Reason == OK {
		return ""
	}
	text := r.Reason.Text()
	switch r.Reason {
	case ConnectRefused, ConnectUnreachable, ConnectTimeout, PeerTimeout:
		return text
	}
	if r.Err == nil {
		return text
	}
	detail := r.Err.Error()
	switch r.Reason {
	case PeerDenied, PeerRefused, PeerUnreachable, PeerAppTimeout, PeerStatus:
		return detail // the status and what it means
	}
	if strings.Contains(detail, text) {
		return detail
	}
	return text + ": " + detail
}

// A Recorder is told of every connection. Its methods run on the pod's loop:
// they must not block and must not keep the Record after Closed or Failed have
// returned, unless they copy it.
type Recorder interface {
	// Opened is called once enough is known to count the connection, before a
	// policy is asked.
	Opened(*Record)
	// Closed is called exactly once for each Opened.
	Closed(*Record)
	// Failed is called, instead of both, for a connection that failed before
	// it could be counted (early deny).
	Failed(*Record)
}

// A Progresser is a Recorder that wants to hear of connections that live long.
type Progresser interface {
	// Progress is called between Opened and Closed, when Pod.Report is, with
	// the bytes so far. It runs on the pod's loop.
	Progress(*Record)
}
