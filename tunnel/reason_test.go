package tunnel

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/xds/mesh"
)

// Every reason has its line in the table.
func TestReasonsAreComplete(t *testing.T) {
	names := make(map[string]bool)
	flags := map[string]bool{"-": true, "DENY": true, "CONNECT": true, "TLS_FAILURE": true, "H2_HANDSHAKE_FAILURE": true, "NETWORK_POLICY": true, "IDENTITY_ERROR": true, "CERT_REVOKED": true}
	for r := OK; r < reasons; r++ {
		switch {
		case r.String() == "" || names[r.String()]:
			t.Errorf("reason %d: name %q", r, r)
		case !flags[r.Flag()]:
			t.Errorf("%v: flag %q", r, r.Flag())
		case r == OK:
		case r.Text() == "" || r.ProxyError() == "" || r.Status() < 400:
			t.Errorf("%v: text %q, proxy error %q, status %d", r, r.Text(), r.ProxyError(), r.Status())
		}
		names[r.String()] = true
	}
	if Reason(200).String() != "failed" {
		t.Errorf("an unknown reason is %v", Reason(200))
	}
}

// What a peer of ours refuses reaches the app as the peer's app would have.
func TestRefusalsSurviveTheTunnel(t *testing.T) {
	for r := OK + 1; r < reasons; r++ {
		there := statusReason(&hbone.StatusError{Status: r.Status(), Proxy: r.ProxyError()})
		switch want := r.Refusal(); {
		case r == ConnectRefused || r == ConnectUnreachable || r == ConnectTimeout || r == Denied:
			if there.Refusal() != want {
				t.Errorf("%v: refused as %v here and %v through the tunnel", r, want, there.Refusal())
			}
		case there == OK:
			t.Errorf("%v is no failure to the peer", r)
		}
	}
	for _, stock := range []hbone.StatusError{{Status: 401}, {Status: 503}, {Status: 400}, {Status: 502}} {
		if got := statusReason(&stock).Refusal(); got != netstack.RefuseReset {
			t.Errorf("a stock peer's %d is %v, want a reset", stock.Status, got)
		}
	}
}

func TestReasonsOfErrors(t *testing.T) {
	at := func(s hbone.Stage, err error) error {
		return fmt.Errorf("x: %w", &hbone.ConnectError{Stage: s, Err: err})
	}
	for _, c := range []struct {
		err  error
		want Reason
	}{
		{at(hbone.StageDial, syscall.ECONNREFUSED), ConnectRefused},
		{at(hbone.StageDial, syscall.ENETUNREACH), ConnectUnreachable},
		{at(hbone.StageDial, syscall.ETIMEDOUT), PeerTimeout},
		{at(hbone.StageDial, hbone.ErrTimeout), PeerTimeout},
		{at(hbone.StageCertificate, errors.New("x")), NoCertificate},
		{at(hbone.StageHandshake, errors.New("x")), TLSFailed},
		{at(hbone.StageAnswer, hbone.ErrTimeout), PeerAppTimeout},
		{at(hbone.StageAnswer, errors.New("x")), TunnelLost},
		{at(hbone.StageQueue, hbone.ErrLimit), Limit},
		{at(hbone.StageQueue, hbone.ErrDraining), Draining},
		{at(hbone.StageQueue, hbone.ErrClosed), Closed},
		{errors.New("x"), ConnectFailed},
	} {
		if got := connectReason(c.err); got != c.want {
			t.Errorf("connectReason(%v) = %v, want %v", c.err, got, c.want)
		}
	}
	for err, want := range map[error]Reason{
		mesh.ErrNoHealthyUpstream: NoUpstream, mesh.ErrNoPort: NoPort, mesh.ErrNoDestination: NoDestination,
		mesh.ErrNoIdentity: NoDestination, &mesh.UnsupportedError{}: Unsupported,
	} {
		if got := routeReason(fmt.Errorf("x: %w", err)); got != want {
			t.Errorf("routeReason(%v) = %v, want %v", err, got, want)
		}
	}
}

// The texts are those of golden/access.jsonl, but for the system's own words.
func TestRecordErrors(t *testing.T) {
	for _, c := range []struct {
		r    Record
		want string
	}{
		{Record{}, ""},
		{Record{Reason: PeerDenied, Err: &hbone.StatusError{Status: 401}}, "http status: 401 Unauthorized"},
		{Record{Reason: PeerRefused, Err: &hbone.StatusError{Status: 503}}, "http status: 503 Service Unavailable"},
		{Record{Reason: Denied, Err: verdictError("explicitly denied by: default/deny-9999")}, "connection closed due to policy rejection: explicitly denied by: default/deny-9999"},
		{Record{Reason: ConnectRefused, Err: syscall.ECONNREFUSED}, "connection failed: connection refused"},
		{Record{Reason: IPMismatch, Err: errors.New("ip mismatch: 10.0.0.2 != 10.0.0.3")}, "ip mismatch: 10.0.0.2 != 10.0.0.3"},
		{Record{Reason: Limit}, "too many connections"},
	} {
		if got := c.r.Error(); got != c.want {
			t.Errorf("Error = %q, want %q", got, c.want)
		}
	}
}
