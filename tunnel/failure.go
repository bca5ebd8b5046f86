package tunnel

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"syscall"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/mesh"
)

// routeReason says why there is no route.
func routeReason(err error) Reason {
	switch {
	case errors.Is(err, mesh.ErrUnsupported):
		return Unsupported
	case errors.Is(err, mesh.ErrNoHealthyUpstream):
		return NoUpstream
	case errors.Is(err, mesh.ErrNoPort):
		return NoPort
	}
	return NoDestination
}

// dialReason says why a TCP connection was not made.
func dialReason(err error) Reason {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		return ConnectRefused
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return ConnectUnreachable
	case errors.Is(err, syscall.ETIMEDOUT):
		return ConnectTimeout
	}
	return ConnectFailed
}

// connectReason says why a CONNECT gave no tunnel.
func connectReason(err error) Reason {
	if status, ok := errors.AsType[*hbone.StatusError](err); ok {
		return statusReason(status)
	}
	at, ok := errors.AsType[*hbone.ConnectError](err)
	switch {
	case revoked(err):
		return CertRevoked
	case errors.Is(err, hbone.ErrLimit), errors.Is(err, hbone.ErrBusy):
		return Limit
	case errors.Is(err, hbone.ErrDraining):
		return Draining
	case errors.Is(err, hbone.ErrClosed):
		return Closed
	case !ok:
		return ConnectFailed
	}
	switch at.Stage {
	case hbone.StageCertificate:
		return NoCertificate
	case hbone.StageQueue:
		return ConnectTimeout
	case hbone.StageDial:
		if why := dialReason(err); why != ConnectTimeout && !errors.Is(err, hbone.ErrTimeout) {
			return why
		}
		return PeerTimeout
	case hbone.StageHandshake:
		if errors.Is(err, splice.ErrReset) || errors.Is(err, io.ErrUnexpectedEOF) {
			return TunnelLost
		}
		return TLSFailed
	}
	switch {
	case errors.Is(err, hbone.ErrTimeout):
		return PeerAppTimeout
	case hbone.IsAlert(err):
		return TLSFailed
	case isHTTP(err):
		return HTTPFailed
	}
	return TunnelLost
}

func isHTTP(err error) bool {
	_, conn := errors.AsType[*h2.ConnError](err)
	_, stream := errors.AsType[*h2.StreamError](err)
	return conn || stream
}

// statusReason says what a peer meant by its answer. A stock peer says no more
// than the status: 401 is its policy, 503 mostly a port that nobody listens on.
func statusReason(s *hbone.StatusError) Reason {
	switch {
	case s.Status == 401:
		return PeerDenied
	case s.Status != 503:
		return PeerStatus
	}
	switch s.Proxy {
	case hbone.DestinationIPUnroutable, hbone.DestinationNotFound:
		return PeerUnreachable
	case hbone.ConnectionTimeout:
		return PeerAppTimeout
	case "", hbone.ConnectionRefused, hbone.DestinationUnavailable, hbone.ConnectionLimitReached, hbone.DestinationIPProhibited:
		return PeerRefused
	}
	return PeerUnreachable
}

// acceptReason says why a peer's connection never came to a CONNECT.
func acceptReason(err error) Reason {
	if ours, ok := errors.AsType[*ReasonError](err); ok {
		return ours.Reason
	}
	switch {
	case revoked(err):
		return CertRevoked
	case errors.Is(err, hbone.ErrLimit), errors.Is(err, hbone.ErrBusy):
		return Limit
	case errors.Is(err, hbone.ErrDraining):
		return Draining
	case errors.Is(err, hbone.ErrClosed):
		return Closed
	}
	return TLSFailed
}

// revoked reports whether a revoked certificate of the peer is behind err.
func revoked(err error) bool {
	_, ok := errors.AsType[*certs.RevokedError](err)
	return ok
}

// mismatch is the detail of IPMismatch.
func mismatch(conn, authority netip.Addr) error {
	return fmt.Errorf("ip mismatch: %v != %v", conn, authority)
}
