package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"
)

const (
	webHeaderTimeout = 2 * time.Second
	webIdleTimeout   = 2 * time.Minute
	maxWebConns      = 256
)

// A health answers the kubelet and the scraper. The zero value is not ready.
type health struct {
	metrics atomic.Pointer[http.Handler]

	// mu guards the fields below.
	mu    sync.Mutex
	ready func() bool // nil: not ready.
	why   func() error
}

func (h *health) set(ready func() bool, why func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ready, h.why = ready, why
}

func (h *health) setMetrics(m http.Handler) { h.metrics.Store(&m) }

// state is nil when the agent is ready.
func (h *health) state() error {
	h.mu.Lock()
	ready, why := h.ready, h.why
	h.mu.Unlock()
	switch {
	case ready == nil:
		return errors.New("starting, or stopping")
	case ready():
		return nil
	}
	if err := why(); err != nil {
		return err
	}
	return errors.New("the plugin is being installed")
}

// checks is the handler for the kubelet: alive as long as it answers, ready when
// new pods are held until they are captured.
func (h *health) checks() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := h.state(); err != nil {
			http.Error(w, "not ready: "+oneLine(err), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

func (h *health) scrape() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		m := h.metrics.Load()
		if m == nil {
			http.Error(w, "starting", http.StatusServiceUnavailable)
			return
		}
		(*m).ServeHTTP(w, r)
	})
	return mux
}

// listen opens both servers, health first. They end with ctx; wait returns when
// they have.
func (n *node) listen(ctx context.Context) (wait func(), err error) {
	var wg sync.WaitGroup
	for _, s := range []struct {
		name    string
		port    uint16
		handler http.Handler
	}{{"health", n.cfg.HealthPort, n.health.checks()}, {"metrics", n.cfg.MonitoringPort, n.health.scrape()}} {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", s.port))
		if err != nil {
			return wg.Wait, fmt.Errorf("%s: %w", s.name, err)
		}
		srv := &http.Server{
			Handler: s.handler, ReadHeaderTimeout: webHeaderTimeout, ReadTimeout: webHeaderTimeout, IdleTimeout: webIdleTimeout,
			MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(n.log.Handler(), slog.LevelDebug),
		}
		wg.Go(func() {
			if err := srv.Serve(netutil.LimitListener(l, maxWebConns)); !errors.Is(err, http.ErrServerClosed) {
				n.fail(fmt.Errorf("%s: %w", s.name, err))
			}
		})
		wg.Go(func() {
			<-ctx.Done()
			_ = srv.Close()
		})
	}
	return wg.Wait, nil
}
