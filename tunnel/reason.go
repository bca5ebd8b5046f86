package tunnel

import (
	"fmt"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel/hbone"
)

// A Reason says why a connection ended or never came to be. What this proxy
// did and what the other side did are different reasons. The zero Reason is a
// connection that both sides ended cleanly.
type Reason uint8

const (
	// OK: both directions ended cleanly.
	OK Reason = iota

	// Decided here, before anything was dialled.

	// SelfCall: the destination is one of the proxy's own ports.
	SelfCall
	// UnknownWorkload: the control plane has not told who this pod is.
	UnknownWorkload
	// NoUpstream: the service has no healthy endpoint.
	NoUpstream
	// NoDestination: the chosen workload has no address that can be dialled.
	NoDestination
	// NoPort: the service exists but its port leads nowhere.
	NoPort
	// UnknownService: the authority's host name is not known.
	UnknownService
	// Unsupported: the route needs something this version does not do, and
	// which is never replaced by a direct connection.
	Unsupported
	// BadRequest: not a CONNECT that can be understood.
	BadRequest
	// IPMismatch: the authority names an address that is not this pod's.
	IPMismatch
	// Limit: the pod has as many connections as it may have.
	Limit
	// NoCertificate: this workload's own certificate is not available.
	NoCertificate
	// Denied: a policy denies the connection.
	Denied
	// PolicyMissing: a policy that the workload names has not been delivered.
	PolicyMissing
	// Draining: the proxy takes no new connections; the next one may.
	Draining

	// Decided here, for a connection that was live.

	// PolicyChange: policies that came later deny the connection.
	PolicyChange
	// CertRevoked: the peer's certificate was revoked by its issuer, before the
	// connection or under it.
	CertRevoked
	// WorkloadGone: the control plane removed this pod's workload.
	WorkloadGone
	// Closed: the pod went away or the drain ran out of time.
	Closed

	// Found while reaching the destination.

	// ConnectRefused: the destination answered with a reset.
	ConnectRefused
	// ConnectUnreachable: the network has no way there.
	ConnectUnreachable
	// ConnectTimeout: the destination did not answer.
	ConnectTimeout
	// PeerTimeout: the peer's tunnel port did not answer; often a
	// NetworkPolicy that does not let 15008 through.
	PeerTimeout
	// TLSFailed: the handshake failed or the peer is not who it must be.
	TLSFailed
	// HTTPFailed: the peer does not speak HTTP/2 as it must.
	HTTPFailed
	// TunnelLost: the tunnel ended under the connection.
	TunnelLost
	// ConnectFailed: reaching the destination failed in another way.
	ConnectFailed

	// Answered by the peer to our CONNECT.

	// PeerDenied: the peer's policy denies it.
	PeerDenied
	// PeerRefused: the peer's app refused the connection.
	PeerRefused
	// PeerUnreachable: the peer cannot reach its app.
	PeerUnreachable
	// PeerAppTimeout: the peer's app did not answer the peer.
	PeerAppTimeout
	// PeerStatus: any other status than 200.
	PeerStatus

	// Done by either end of a live connection.

	// ClientReset: the side that opened the connection reset it.
	ClientReset
	// ServerReset: the side that accepted the connection reset it.
	ServerReset
	// ClientGone: the client gave up before it had an answer.
	ClientGone

	// Failed: a fault inside this proxy.
	Failed

	reasons // How many there are.
)

// An effect is what the world sees of a Reason.
type effect struct {
	name   string // for dumps and tests
	text   string // the access log's error
	flag   string // response_flags of the metrics
	status int    // answer to a peer's CONNECT
	proxy  hbone.ProxyError
	answer netstack.Refusal // answer to a SYN
	early  bool             // logged as early deny, without metrics
}

const (
	flagNone    = "-"
	flagDeny    = "DENY"
	flagConnect = "CONNECT"
)

var effects = [reasons]effect{
	OK: {name: "ok", flag: flagNone, status: 200},

	SelfCall:        {"self-call", "attempted recursive call to ourselves", flagConnect, 503, hbone.DestinationIPProhibited, netstack.RefuseReset, true},
	UnknownWorkload: {"unknown-workload", "local workload is not known", flagConnect, 503, hbone.ProxyConfigurationError, netstack.RefuseUnreachable, true},
	NoUpstream:      {"no-upstream", "no healthy upstream", flagConnect, 503, hbone.DestinationUnavailable, netstack.RefuseReset, true},
	NoDestination:   {"no-destination", "no valid routing destination", flagConnect, 503, hbone.DestinationNotFound, netstack.RefuseUnreachable, true},
	NoPort:          {"no-port", "service found, but its port could not be resolved", flagConnect, 503, hbone.DestinationUnavailable, netstack.RefuseReset, true},
	UnknownService:  {"unknown-service", "no service or workload for hostname", flagConnect, 503, hbone.DestinationNotFound, netstack.RefuseUnreachable, true},
	Unsupported:     {"unsupported", "route is not supported yet", flagConnect, 503, hbone.ProxyConfigurationError, netstack.RefuseUnreachable, true},
	BadRequest:      {"bad-request", "invalid CONNECT request", flagConnect, 400, hbone.HTTPRequestError, netstack.RefuseReset, true},
	IPMismatch:      {"ip-mismatch", "ip mismatch", flagConnect, 400, hbone.DestinationIPProhibited, netstack.RefuseReset, true},
	Limit:           {"limit", "too many connections", flagConnect, 503, hbone.ConnectionLimitReached, netstack.RefuseReset, false},
	NoCertificate:   {"no-certificate", "identity error: no certificate", "IDENTITY_ERROR", 503, hbone.ProxyInternalError, netstack.RefuseUnreachable, false},
	Denied:          {"denied", "connection closed due to policy rejection", flagDeny, 401, hbone.HTTPRequestDenied, netstack.RefuseReset, false},
	PolicyMissing:   {"policy-missing", "connection closed due to policy rejection", flagDeny, 401, hbone.HTTPRequestDenied, netstack.RefuseReset, false},
	Draining:        {"draining", "connection closed due to connection drain", flagNone, 503, hbone.DestinationUnavailable, netstack.RefuseSilent, false},

	PolicyChange: {"policy-change", "connection closed due to policy change", flagDeny, 401, hbone.HTTPRequestDenied, netstack.RefuseReset, false},
	CertRevoked:  {"cert-revoked", "connection closed since peer cert revoked by CRL", "CERT_REVOKED", 503, hbone.TLSCertificateError, netstack.RefuseUnreachable, false},
	WorkloadGone: {"workload-gone", "connection closed since its workload was removed", flagNone, 503, hbone.DestinationUnavailable, netstack.RefuseReset, false},
	Closed:       {"closed", "connection closed due to connection drain", flagNone, 503, hbone.DestinationUnavailable, netstack.RefuseReset, false},

	ConnectRefused:     {"connect-refused", "connection failed: connection refused", flagConnect, 503, hbone.ConnectionRefused, netstack.RefuseReset, false},
	ConnectUnreachable: {"connect-unreachable", "connection failed: no route to host", flagConnect, 503, hbone.DestinationIPUnroutable, netstack.RefuseUnreachable, false},
	ConnectTimeout:     {"connect-timeout", "connection failed: connection timed out", flagConnect, 503, hbone.ConnectionTimeout, netstack.RefuseSilent, false},
	PeerTimeout:        {"peer-timeout", "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008", "NETWORK_POLICY", 503, hbone.ConnectionTimeout, netstack.RefuseSilent, false},
	TLSFailed:          {"tls-failed", "tls error", "TLS_FAILURE", 503, hbone.TLSCertificateError, netstack.RefuseUnreachable, false},
	HTTPFailed:         {"http-failed", "h2 failed", "H2_HANDSHAKE_FAILURE", 503, hbone.HTTPProtocolError, netstack.RefuseUnreachable, false},
	TunnelLost:         {"tunnel-lost", "tunnel lost", flagConnect, 503, hbone.ConnectionTerminated, netstack.RefuseUnreachable, false},
	ConnectFailed:      {"connect-failed", "connection failed", flagConnect, 503, hbone.ProxyInternalError, netstack.RefuseUnreachable, false},

	PeerDenied:      {"peer-denied", "http status", flagConnect, 401, hbone.HTTPRequestDenied, netstack.RefuseReset, false},
	PeerRefused:     {"peer-refused", "http status", flagConnect, 503, hbone.ConnectionRefused, netstack.RefuseReset, false},
	PeerUnreachable: {"peer-unreachable", "http status", flagConnect, 503, hbone.DestinationIPUnroutable, netstack.RefuseUnreachable, false},
	PeerAppTimeout:  {"peer-app-timeout", "http status", flagConnect, 503, hbone.ConnectionTimeout, netstack.RefuseSilent, false},
	PeerStatus:      {"peer-status", "http status", flagConnect, 503, hbone.ProxyInternalError, netstack.RefuseReset, false},

	ClientReset: {"client-reset", "connection reset by the client", flagNone, 503, hbone.ConnectionTerminated, netstack.RefuseReset, false},
	ServerReset: {"server-reset", "connection reset by the backend", flagNone, 503, hbone.ConnectionTerminated, netstack.RefuseReset, false},
	ClientGone:  {"client-gone", "client went away before the connection was made", flagNone, 503, hbone.ConnectionTerminated, netstack.RefuseReset, false},

	Failed: {"failed", "internal error", flagConnect, 503, hbone.ProxyInternalError, netstack.RefuseUnreachable, false},
}

// String returns the reason's short name, as dumps and tests show it.
func (r Reason) String() string { return r.effect().name }

// Text returns what the access log says in `error`, without detail; it is
// empty for OK.
func (r Reason) Text() string { return r.effect().text }

// Flag returns the metrics' response_flags. "-" means that it does not count
// as a failure.
func (r Reason) Flag() string { return r.effect().flag }

// Status returns the HTTP status that answers a peer's CONNECT.
func (r Reason) Status() int { return r.effect().status }

// ProxyError returns the RFC 9209 error type that goes with Status.
func (r Reason) ProxyError() hbone.ProxyError { return r.effect().proxy }

// Refusal returns how the app, or a plaintext client, is refused.
func (r Reason) Refusal() netstack.Refusal { return r.effect().answer }

// EarlyDeny reports whether the connection failed before enough was known to
// count it: it is logged as a failed connection and not measured.
func (r Reason) EarlyDeny() bool { return r.effect().early }

func (r Reason) effect() *effect {
	if r >= reasons {
		r = Failed
	}
	return &effects[r]
}

// A ReasonError carries a Reason through an error, with its cause.
type ReasonError struct {
	Reason Reason
	Err    error // nil when the reason says it all
}

func (e *ReasonError) Error() string {
	if e.Err == nil {
		return "tunnel: " + e.Reason.Text()
	}
	return fmt.Sprintf("tunnel: %s: %v", e.Reason.Text(), e.Err)
}

func (e *ReasonError) Unwrap() error { return e.Err }
