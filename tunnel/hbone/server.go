package hbone

import (
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"sync/atomic"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
)

// ServerConfig configures a Server. A zero number means its default.
type ServerConfig struct {
	Loop       splice.Loop
	Handshakes *Handshakes
	// TLS finds the configuration with the current certificate. done runs once
	// on the loop, perhaps before TLS returns, unless cancel is called before;
	// cancel may be nil once it has run.
	TLS func(done func(*tls.Config, error)) (cancel func())
	// Revocations are asked again about live connections, by CutRevoked; nil:
	// nothing is revoked. In handshakes the certificates' own are asked.
	Revocations *certs.Revocations
	// H2 is for every connection; Client and the callbacks are set by the
	// Server.
	H2 h2.Config
	// Handle answers each CONNECT, now or later, by Accept or Refuse.
	Handle func(*Incoming)
	// Failed is told of connections that never came to speak HTTP/2.
	Failed func(remote, local netip.AddrPort, err error)
	// Idle is told when the last connection has ended. May be nil.
	Idle func()

	MaxConns      int // open connections; 2048
	MaxHandshakes int // of them before the end of the TLS handshake; 64
	MaxPerSource  int // of those from one address; a quarter of MaxHandshakes
}

// A Server speaks HBONE on the connections it is given. It serves one pod.
type Server struct {
	cfg        ServerConfig
	conns      map[*serverConn]struct{}
	handshakes int
	sources    map[netip.Addr]int // handshakes by address
	drain      bool
	closed     bool
	stats      ServerStats
}

// ServerStats count what a Server did. They may be read from anywhere.
type ServerStats struct {
	Conns          atomic.Int64  // open now
	Handshakes     atomic.Int64  // under way now
	HandshakeFails atomic.Uint64 // of peers, before HTTP/2
	Streams        atomic.Uint64 // CONNECTs received
	Limited        atomic.Uint64 // connections refused by a limit
}

// NewServer returns a Server without connections.
func NewServer(cfg ServerConfig) *Server {
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = 2048
	}
	if cfg.MaxHandshakes <= 0 {
		cfg.MaxHandshakes = 64
	}
	if cfg.MaxPerSource <= 0 {
		cfg.MaxPerSource = max(1, cfg.MaxHandshakes/4)
	}
	return &Server{cfg: cfg, conns: make(map[*serverConn]struct{}), sources: make(map[netip.Addr]int)}
}

// Stats returns the counters.
func (s *Server) Stats() *ServerStats { return &s.stats }

// Serve takes over a connection that remote opened to local.
func (s *Server) Serve(end splice.End, remote, local netip.AddrPort) {
	c := &serverConn{server: s, remote: canonical(remote), local: canonical(local)}
	if err := s.admit(c.remote.Addr()); err != nil {
		end.Reset(err)
		end.Close()
		if s.cfg.Failed != nil {
			s.cfg.Failed(c.remote, c.local, err)
		}
		return
	}
	s.conns[c] = struct{}{}
	s.handshaking(c, 1)
	c.end = end
	if stop := s.cfg.TLS(c.handshake); c.end != nil {
		c.stop = stop
	}
}

func (s *Server) admit(source netip.Addr) error {
	switch {
	case s.closed:
		return ErrClosed
	case len(s.conns) >= s.cfg.MaxConns, s.handshakes >= s.cfg.MaxHandshakes, s.sources[source] >= s.cfg.MaxPerSource:
		s.stats.Limited.Add(1)
		return ErrLimit
	}
	return nil
}

// Drain asks the peers to open no more streams, those of connections that were
// under way too. A connection ends after its last stream.
func (s *Server) Drain() {
	s.drain = true
	for c := range s.conns {
		if c.h2 != nil {
			c.h2.GoAway()
		}
	}
}

// CutRevoked ends, at once, every connection of a peer that has been revoked
// since its handshake. Its streams fail with a *certs.RevokedError.
func (s *Server) CutRevoked() {
	for c := range s.conns {
		if err := s.cfg.Revocations.Check(c.proof); err != nil {
			s.cfg.Revocations.Rejected(certs.Destination)
			c.h2.Close(err)
		}
	}
}

// Close ends everything at once.
func (s *Server) Close() {
	s.closed = true
	for c := range s.conns {
		if c.h2 != nil {
			c.h2.Close(ErrClosed)
			continue
		}
		c.abort()
		c.gone()
	}
}

// handshaking counts the handshakes under way.
func (s *Server) handshaking(c *serverConn, n int) {
	from := c.remote.Addr()
	s.handshakes += n
	if s.sources[from] += n; s.sources[from] <= 0 {
		delete(s.sources, from)
	}
	s.count()
}

func (s *Server) count() {
	s.stats.Conns.Store(int64(len(s.conns)))
	s.stats.Handshakes.Store(int64(s.handshakes))
}

// A serverConn is one accepted connection.
type serverConn struct {
	server        *Server
	remote, local netip.AddrPort
	peer          identity.ID
	end           splice.End   // until the handshake owns it
	stop          func()       // ends the wait for a certificate, or the handshake
	h2            *h2.Conn     // once the handshake is over
	proof         *certs.Proof // with h2; nil: nothing can be revoked
	ended         bool
}

// abort ends what comes before h2.
func (c *serverConn) abort() {
	if c.stop != nil {
		c.stop()
	}
	if c.end != nil {
		c.end.Reset(ErrClosed)
		c.end.Close()
	}
}

func (c *serverConn) handshake(cfg *tls.Config, err error) {
	end := c.end
	c.end = nil
	if err != nil {
		end.Reset(err)
		end.Close()
		c.fail(&ConnectError{StageCertificate, err})
		return
	}
	s := c.server
	c.stop = s.cfg.Handshakes.Start(s.cfg.Loop, end, AsServer, cfg, c.local, c.remote, func(t *TLS, err error) {
		if err == nil {
			c.peer, err = certs.PeerID(t.State())
			c.proof = proofOf(s.cfg.Revocations, t, nil)
			if err == nil {
				// Between the handshake and now the lists may have changed unseen by CutRevoked.
				err = s.cfg.Revocations.Check(c.proof)
			}
			if err != nil {
				t.Reset(err)
				t.Close()
			}
		}
		if err != nil {
			if revoked(err) {
				s.cfg.Revocations.Rejected(certs.Destination)
			}
			c.fail(&ConnectError{StageHandshake, err})
			return
		}
		c.serve(t)
	})
}

func (c *serverConn) fail(err error) {
	s := c.server
	c.gone()
	if errors.Is(err, ErrClosed) {
		return
	}
	s.stats.HandshakeFails.Add(1)
	if s.cfg.Failed != nil {
		s.cfg.Failed(c.remote, c.local, err)
	}
}

func (c *serverConn) serve(t *TLS) {
	s := c.server
	s.handshaking(c, -1)
	cfg := s.cfg.H2
	cfg.Client = false
	cfg.OnStream = c.onStream
	cfg.OnClose = func(error) { c.gone() }
	c.h2 = h2.New(s.cfg.Loop, t, &cfg)
	if s.drain {
		c.h2.GoAway()
	}
}

// gone forgets the connection.
func (c *serverConn) gone() {
	if c.ended {
		return
	}
	c.ended = true
	s := c.server
	delete(s.conns, c)
	if c.h2 == nil {
		s.handshaking(c, -1)
	}
	s.count()
	if len(s.conns) == 0 && s.cfg.Idle != nil {
		s.cfg.Idle()
	}
}

func (c *serverConn) onStream(st *h2.Stream, r h2.Request) {
	c.server.stats.Streams.Add(1)
	in := &Incoming{
		Authority: r.Authority,
		Peer:      c.peer,
		Remote:    c.remote,
		Local:     c.local,
		Network:   r.Header(HeaderNetwork),
		Host:      ForwardedHost(r.Header(HeaderForwarded)),
		stream:    st,
		request:   r,
	}
	c.server.cfg.Handle(in)
}

// An Incoming is a CONNECT that must be answered exactly once.
type Incoming struct {
	Authority string         // as sent, not parsed
	Peer      identity.ID    // proven by the peer's certificate
	Remote    netip.AddrPort // of the TCP connection
	Local     netip.AddrPort // of the TCP connection
	Host      string         // the service that the client says it called, or ""
	Network   string         // x-forwarded-network, or ""

	stream  *h2.Stream
	request h2.Request
}

// Baggage is what the client says of itself; zero if it cannot be read.
func (in *Incoming) Baggage() Baggage {
	var values []string
	for _, h := range in.request.Headers {
		if h.Name == HeaderBaggage {
			values = append(values, h.Value)
		}
	}
	b, err := ParseBaggage(values)
	if err != nil {
		return Baggage{}
	}
	return b
}

// Trace is the client's trace context, or a new one.
func (in *Incoming) Trace() Trace {
	if t, ok := ParseTrace(in.request.Header(HeaderTraceparent)); ok {
		return t
	}
	return NewTrace()
}

// Watch calls gone if the client gives up before it has been answered.
func (in *Incoming) Watch(gone func(error)) {
	in.stream.Notify(func() {
		// Reading into nothing takes no data and finds the error, if any. The
		// client may well have said all it has to say.
		if _, err := in.stream.Read(nil); err != io.EOF && !errors.Is(err, splice.ErrAgain) {
			gone(err)
		}
	})
}

// Accept answers 200, with a baggage header that describes the destination if
// baggage is not nil, and returns the stream, which the caller owns from then
// on.
func (in *Incoming) Accept(baggage *string) (splice.End, error) {
	r := h2.Response{Status: 200}
	if baggage != nil {
		r.Headers = []h2.Header{{Name: HeaderBaggage, Value: *baggage}}
	}
	in.stream.Notify(nil)
	if err := in.stream.Respond(r); err != nil {
		in.stream.Close()
		return nil, err
	}
	return in.stream, nil
}

// Refuse answers with status and the Proxy-Status that says why.
func (in *Incoming) Refuse(status int, why ProxyError) {
	r := h2.Response{Status: status, EndStream: true}
	if why != "" {
		r.Headers = []h2.Header{{Name: HeaderProxyStatus, Value: ProxyStatus(why)}}
	}
	// If the stream has ended already there is nobody to tell.
	_ = in.stream.Respond(r)
	in.stream.Close()
}

// canonical turns IPv4 in IPv6 into IPv4.
func canonical(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
