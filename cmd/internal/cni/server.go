package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
	"github.com/ztun/ztun/cmd/internal/socket"
)

const (
	// enrolTimeout bounds one request. The plugin gives up at five seconds, which
	// ends the request as well; this is for one that stays connected.
	enrolTimeout = 10 * time.Second
	headTimeout  = 2 * time.Second
	// maxPlugins bounds the plugins that wait at once. More wait in the
	// listener's queue, and in the end fail, as they must.
	maxPlugins = 256
	maxHeader  = 8 << 10
)

// A Server hears of new pods on a unix socket. The one who connects is the
// runtime's plugin, which is root: the socket is open to nobody else. (Istio's
// is open to everyone, so any process that sees it could claim pods.)
type Server struct {
	// Set by NewServer, read-only after.
	socket   string
	enroller Enroller
	log      *slog.Logger

	// mu guards the field below.
	mu     sync.Mutex
	counts map[string]uint64 // By response code.
}

// NewServer makes a server. Run opens the socket.
func NewServer(socket string, e Enroller, log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{socket: socket, enroller: e, log: log, counts: map[string]uint64{}}
}

// Counts is how many requests were answered, by HTTP response code.
func (s *Server) Counts() map[string]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.counts)
}

// Run serves until ctx ends, and returns when no request is under way. It
// leaves the socket's file: the next agent may have put its own there.
func (s *Server) Run(ctx context.Context) error {
	l, err := socket.Listen("unix", s.socket, 0, 0)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc(wire.AddPath, s.add)
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: headTimeout, ReadTimeout: enrolTimeout, IdleTimeout: headTimeout, MaxHeaderBytes: maxHeader,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		// Requests have ctx: they end now.
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), headTimeout)
		defer cancel()
		if srv.Shutdown(limit) != nil {
			_ = srv.Close()
		}
	})
	err = srv.Serve(netutil.LimitListener(l, maxPlugins))
	if stop() {
		return fmt.Errorf("cni: serve %s: %w", s.socket, err)
	}
	<-stopped
	return nil
}

// add answers when the pod may start (200), or why it must not.
func (s *Server) add(w http.ResponseWriter, r *http.Request) {
	code, err := s.handle(r)
	s.mu.Lock()
	s.counts[strconv.Itoa(code)]++
	s.mu.Unlock()
	if err != nil {
		http.Error(w, err.Error(), code)
		return
	}
	w.WriteHeader(code)
}

func (s *Server) handle(r *http.Request) (int, error) {
	if r.Method != http.MethodPost {
		return http.StatusMethodNotAllowed, errors.New("cni: only POST")
	}
	text, err := readAll(r.Body, wire.MaxEvent)
	if err != nil {
		return http.StatusBadRequest, fmt.Errorf("cni: request: %w", err)
	}
	e, err := wire.Decode(text)
	if err != nil {
		s.log.Warn("malformed request of the plugin", "error", err)
		return http.StatusBadRequest, fmt.Errorf("cni: request: %w", err)
	}
	req := Request{Netns: e.Netns, PodName: e.PodName, PodNamespace: e.PodNamespace, PodUID: e.PodUID}
	for _, ip := range e.IPs {
		req.IPs = append(req.IPs, ip.Address)
	}
	ctx, cancel := context.WithTimeout(r.Context(), enrolTimeout)
	defer cancel()
	if err := s.enrol(ctx, req); err != nil {
		s.log.Warn("pod must not start yet", "pod", req.PodNamespace+"/"+req.PodName, "uid", req.PodUID, "error", err)
		return http.StatusInternalServerError, err
	}
	return http.StatusOK, nil
}

// enrol makes of a panic an error: it is one pod's, and the pod must not start.
func (s *Server) enrol(ctx context.Context, req Request) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("cni: enrol: panic: %v", v)
		}
	}()
	return s.enroller.Enrol(ctx, req)
}
