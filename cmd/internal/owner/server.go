package owner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxConns bounds the connections of all proxies; each has a few.
	maxConns = 64
	// answerTimeout bounds how long a peer may take to fetch an answer.
	answerTimeout = time.Second
	// acceptPause follows an accept that failed: out of descriptors, for one.
	acceptPause = 100 * time.Millisecond
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// Of says who owns a socket of the host: node is the host's end. Required.
	Of func(node, app netip.AddrPort) (Owner, error)
	// Addresses are those of a pod of this node; none: there is no such pod, and
	// nothing is said of its connections. Nil: every pod is believed.
	Addresses func(uid string) []netip.Addr
	// UID is the user whose processes may ask, besides our own user.
	UID int
	// Log takes what the Server has to say. Nil: nothing is logged.
	Log *slog.Logger
}

// ServerStats counts over the life of a Server.
type ServerStats struct {
	Answers map[string]uint64 // By owner, and "failed".
	Refused uint64            // Connections of others than the proxies.
}

// A Server answers questions.
type Server struct {
	cfg ServerConfig
	wg  sync.WaitGroup

	// mu guards the fields below.
	mu    sync.Mutex
	conns map[*net.UnixConn]struct{}
	stats ServerStats
}

// NewServer makes a server. Serve starts it.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, conns: map[*net.UnixConn]struct{}{}, stats: ServerStats{Answers: map[string]uint64{}}}
}

// Stats returns the counts as they are now.
func (s *Server) Stats() ServerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := ServerStats{Answers: map[string]uint64{}, Refused: s.stats.Refused}
	for k, n := range s.stats.Answers {
		st.Answers[k] = n
	}
	return st
}

// Serve answers until ctx ends, and returns when every connection is closed. It
// owns l.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() {
		_ = l.Close()
		s.hangUp()
	})
	defer s.wg.Wait()
	defer s.hangUp()
	defer cancel()
	defer stop()
	for {
		conn, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close()
			}
			return context.Cause(ctx)
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("owner: accept: %w", err)
		case err != nil:
			s.cfg.Log.Error("accepting a proxy that asks", "error", err)
			pause(ctx, acceptPause)
			continue
		}
		if err := s.admit(conn); err != nil {
			s.cfg.Log.Warn("somebody who asks was turned away", "error", err)
			_ = conn.Close()
			continue
		}
		s.wg.Go(func() { s.answer(ctx, conn) })
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (s *Server) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close()
	}
}

// admit registers a connection of who may ask.
func (s *Server) admit(conn *net.UnixConn) error {
	uid, err := peerUser(conn)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil:
	case uid != s.cfg.UID && uid != unix.Geteuid():
		err = fmt.Errorf("owner: peer is user %d, not %d", uid, s.cfg.UID)
	case len(s.conns) >= maxConns:
		err = fmt.Errorf("owner: there are %d connections", len(s.conns))
	}
	if err != nil {
		s.stats.Refused++
		return err
	}
	s.conns[conn] = struct{}{}
	return nil
}

func peerUser(conn *net.UnixConn) (int, error) {
	rc, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var optErr error
	err = rc.Control(func(fd uintptr) { cred, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, optErr); err != nil {
		return 0, fmt.Errorf("owner: peer's credentials: %w", err)
	}
	return int(cred.Uid), nil
}

// answer serves one connection, a question at a time.
func (s *Server) answer(ctx context.Context, conn *net.UnixConn) {
	err := s.talk(conn)
	_ = conn.Close()
	s.mu.Lock()
	delete(s.conns, conn)
	s.mu.Unlock()
	if err != io.EOF && ctx.Err() == nil {
		s.cfg.Log.Warn("a proxy that asks was hung up on", "error", err)
	}
}

func (s *Server) talk(conn *net.UnixConn) error {
	buf := make([]byte, maxQuestion+1)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return err
		}
		q, err := parseQuestion(buf[:n])
		if err != nil {
			return err
		}
		if err := conn.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
			return err
		}
		if _, err := conn.Write([]byte{version, s.decide(q)}); err != nil {
			return err
		}
	}
}

// decide returns the byte that answers.
func (s *Server) decide(q Question) byte {
	o, err := None, error(nil)
	if s.cfg.Addresses == nil || slices.Contains(s.cfg.Addresses(q.Pod), q.App.Addr()) {
		o, err = s.cfg.Of(q.Node, q.App)
	}
	said, what := byte(o), o.String()
	if err != nil {
		said, what = cannotSay, "failed"
		s.cfg.Log.Warn("whose a connection is cannot be said", "src", q.Node, "dst", q.App, "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Answers[what]++
	return said
}
