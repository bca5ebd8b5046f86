package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	securityv1alpha1 "istio.io/api/security/v1alpha1"
)

// Server serves one directory to the proxies of a mesh.
type Server struct {
	// Set by New, read-only after.
	cfg      Config
	log      *slog.Logger
	src      source
	state    stateDir
	identity *servingIdentity
	stopping chan struct{} // closed when Serve ends

	trust   atomic.Pointer[trust]
	streams sync.WaitGroup // goroutines of ADS streams

	// reading guards the fields below: one reading of the directory at a time.
	reading sync.Mutex
	book    *addressBook
	print   uint64 // of the files last read

	mu sync.Mutex
	// mu guards the fields below.
	world   *World
	changed chan struct{} // closed when world is replaced
	last    Report
	serving Report
	clients map[*stream]bool
	nacks   []Nack
	served  bool
}

// New prepares a server: it makes or opens the state, and reads the directory
// once. A directory with problems is no error; its report is in Status.
func New(cfg Config) (*Server, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, log: cfg.Log,
		src:      source{dir: cfg.Dir, static: cfg.Static},
		state:    stateDir{dir: cfg.State, trustDomain: cfg.Mesh.TrustDomain},
		stopping: make(chan struct{}),
		changed:  make(chan struct{}),
		clients:  make(map[*stream]bool),
	}
	trusted, err := s.loadTrust()
	if err != nil {
		return nil, err
	}
	s.trust.Store(trusted)
	s.identity = &servingIdentity{srv: s}
	if s.book, err = s.state.loadAddresses(); err != nil {
		return nil, err
	}
	s.read(true)
	return s, nil
}

// Serve answers on l, which it closes, until ctx ends; then it returns nil.
// All its goroutines have ended when it returns. It may be called once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.mu.Lock()
	again := s.served
	s.served = true
	s.mu.Unlock()
	if again {
		return errors.Join(errors.New("control: Serve was called before"), l.Close())
	}
	if err := s.identity.prepare(l.Addr()); err != nil {
		return errors.Join(err, l.Close())
	}
	g := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(s.identity.tlsConfig())),
		grpc.WaitForHandlers(true),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.MaxConcurrentStreams(256),
		// The names and versions a proxy brings when it returns.
		grpc.MaxRecvMsgSize(64<<20),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		// ztunnel pings every 30 seconds.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	discovery.RegisterAggregatedDiscoveryServiceServer(g, discoveryService{srv: s})
	securityv1alpha1.RegisterIstioCertificateServiceServer(g, certificateService{srv: s})

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var background sync.WaitGroup
	background.Go(func() { s.watch(ctx) })
	background.Go(func() {
		<-ctx.Done()
		close(s.stopping)
		g.Stop()
	})
	err := g.Serve(netutil.LimitListener(l, s.cfg.Limits.Connections))
	stopped := ctx.Err() != nil
	cancel()
	background.Wait()
	s.streams.Wait()
	if stopped {
		return nil
	}
	return fmt.Errorf("control: serve: %w", err)
}

// watch follows the directory and the state until ctx ends.
func (s *Server) watch(ctx context.Context) {
	dir := &watcher{src: s.src, debounce: s.cfg.Debounce, rescan: s.cfg.Rescan, wake: make(chan struct{}, 1)}
	secrets := s.cfg.State
	if s.cfg.CACert != "" {
		secrets = filepath.Dir(s.cfg.CACert)
	}
	state := &watcher{src: source{dir: secrets}, debounce: s.cfg.Debounce, rescan: s.cfg.Rescan, wake: make(chan struct{}, 1)}
	var watchers sync.WaitGroup
	defer watchers.Wait()
	watchers.Go(func() { dir.run(ctx) })
	if secrets != "" {
		watchers.Go(func() { state.run(ctx) })
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-dir.wake:
			s.read(false)
		case <-state.wake:
			s.reloadTrust()
		}
	}
}

// Reload reads the directory and the state now, and returns once the result is
// in force.
func (s *Server) Reload(ctx context.Context) (Report, error) {
	s.reloadTrust()
	r := s.read(true)
	return r, errors.Join(ctx.Err(), r.Err())
}

// read reads the directory and serves what it finds, unless something in it
// cannot be used. Without force, files that are the same as before are left.
func (s *Server) read(force bool) Report {
	s.reading.Lock()
	defer s.reading.Unlock()
	ps := &problems{}
	files := s.src.read(ps)
	print := fingerprint(files)
	// A file that could not be read is not in files: such a reading is not the
	// same as any.
	if !force && print == s.print && !ps.fatal() {
		return s.lastReport()
	}
	book := s.book.reading()
	world, report := interpret(s.cfg, files, ps, book)
	if same := s.lastReport(); !force && !report.Used && print == s.print && slices.Equal(same.Problems, report.Problems) {
		return same
	}
	s.print = print
	if report.Used {
		s.book = book.next()
		if err := s.state.saveAddresses(s.book); err != nil {
			s.log.Error("service addresses are not kept", "error", err)
		}
	}
	s.publish(world, report)
	if s.cfg.OnLoad != nil {
		s.cfg.OnLoad(report)
	}
	return report
}

func (s *Server) lastReport() Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// publish puts a report and, if it is used, its world in force.
func (s *Server) publish(w *World, r Report) {
	s.mu.Lock()
	s.last = r
	if r.Used {
		s.serving, s.world = r, w
		close(s.changed)
		s.changed = make(chan struct{})
	}
	s.mu.Unlock()
	if r.Used {
		s.log.Info("directory read", "summary", r.Summary())
	} else {
		s.log.Error("directory not used, the last good state stays in force", "problems", len(r.Problems)-r.Warnings())
	}
}

// interpret makes the world that files describe.
func interpret(cfg Config, files map[string][]byte, ps *problems, book *addressBook) (*World, Report) {
	set := readObjects(files, ps)
	broken, read := ps.fatal(), len(ps.list)
	world := build(cfg, set, ps, book)
	if broken {
		// What misses something may miss an object that could not be read.
		ps.list = append(ps.list[:read], slices.DeleteFunc(ps.list[read:], func(p Problem) bool { return p.Warning })...)
	}
	sortProblems(ps.list)
	r := Report{At: cfg.Now(), Problems: ps.list, Counts: set.counts, Used: !ps.fatal()}
	if !r.Used {
		return nil, r
	}
	return world, r
}

// Check reads a directory as a server would, and reports; nothing is served. The
// world is nil unless the report's Used is true. State, if set, is only read.
func Check(cfg Config) (*World, Report) {
	cfg = cfg.withDefaults()
	ps := &problems{}
	if err := cfg.Validate(); err != nil {
		return nil, Report{At: cfg.Now(), Problems: []Problem{{File: cfg.Dir, Text: err.Error()}}}
	}
	book, err := stateDir{dir: cfg.State}.loadAddresses()
	if err != nil {
		return nil, Report{At: cfg.Now(), Problems: []Problem{{File: cfg.State, Text: err.Error()}}}
	}
	files := source{dir: cfg.Dir, static: cfg.Static}.read(ps)
	return interpret(cfg, files, ps, book.reading())
}

// current returns the world in force, nil before the first, and a channel that
// is closed when there is another.
func (s *Server) current() (*World, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.world, s.changed
}

// World returns what is served, nil before the first good state.
func (s *Server) World() *World {
	w, _ := s.current()
	return w
}

// Token returns a node token: what a proxy of that node must present. It is a
// secret. A ttl of 0 means 12 hours.
func (s *Server) Token(node string, ttl time.Duration) (string, error) {
	return mintToken(s.trust.Load().tokenKey, node, ttl, s.cfg.Now())
}

// RootPEM returns the roots that proxies must trust, as PEM.
func (s *Server) RootPEM() []byte { return slices.Clone(s.trust.Load().rootPEM) }

// loadTrust reads the state, or the files of a CA made elsewhere.
func (s *Server) loadTrust() (*trust, error) {
	own := s.cfg.CACert == ""
	if s.cfg.State == "" && s.trust.Load() != nil && own {
		return s.trust.Load(), nil
	}
	key, as, err := s.state.load(own, s.cfg.Now())
	if err != nil {
		return nil, err
	}
	if have := s.trust.Load(); s.cfg.State == "" && have != nil {
		key = have.tokenKey
	}
	c := &trust{tokenKey: key}
	if own {
		signing := as.of(roleSigning)
		c.signer, c.roots = &signing.authority, as.roots()
	} else if c.signer, c.roots, err = readAuthority(s.cfg.CACert, s.cfg.CAKey, s.cfg.CARoot); err != nil {
		return nil, err
	}
	c.rootPEM = encodeCerts(c.roots...)
	if !own && s.cfg.State != "" {
		err = s.state.saveRootPEM(c.rootPEM)
	}
	return c, err
}

// reloadTrust puts a changed state in force. What cannot be used is
// logged, and the old one stays.
func (s *Server) reloadTrust() {
	s.reading.Lock()
	defer s.reading.Unlock()
	c, err := s.loadTrust()
	if err != nil {
		s.log.Error("state not used, the last good one stays in force", "error", err)
		return
	}
	old := s.trust.Swap(c)
	if !old.signer.cert.Equal(c.signer.cert) || string(old.rootPEM) != string(c.rootPEM) {
		s.log.Info("the CA changed", "signer", c.signer.cert.Subject, "roots", len(c.roots))
	}
}

// Status returns what is in force and who listens.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Last: s.last, Serving: s.serving, Nacks: slices.Clone(s.nacks)}
	for c := range s.clients {
		st.Clients = append(st.Clients, c.client.snapshot())
	}
	slices.SortFunc(st.Clients, func(a, b Client) int {
		if a.Node != b.Node {
			return strings.Compare(a.Node, b.Node)
		}
		return a.Since.Compare(b.Since)
	})
	return st
}

// Status is a server as seen from outside.
type Status struct {
	Last    Report // the latest reading
	Serving Report // the reading that is in force; zero before the first good one
	Clients []Client
	Nacks   []Nack // the latest ones, oldest first
}

// Client is one ADS stream.
type Client struct {
	Node, NodeID, Remote string
	Since, TokenExpires  time.Time
	// Sent, Acked and Nacked count responses by short type name (Address, Authorization).
	Sent, Acked, Nacked map[string]uint64
}

// Nack is a response that a proxy could not use all of.
type Nack struct {
	At                  time.Time
	Node, Type, Message string
}
