package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A book is a Handler that keeps what it is given and rejects bodies that
// begin with "bad".
type book struct {
	mu   sync.Mutex
	held map[string]string
}

func newBook() *book { return &book{held: make(map[string]string)} }

func (b *book) Apply(added []Resource, removed []string) (rejected []Rejection) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range added {
		if strings.HasPrefix(string(r.Body), "bad") {
			rejected = append(rejected, Rejection{r.Name, errors.New("it is bad")})
			continue
		}
		b.held[r.Name] = string(r.Body)
	}
	for _, name := range removed {
		delete(b.held, name)
	}
	return rejected
}

func (b *book) want(t *testing.T, why string, want map[string]string) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if diff := cmp.Diff(want, b.held); diff != "" {
		t.Errorf("%s: -want +got\n%s", why, diff)
	}
}

// A run is a Client under test. sleeps gets every pause that it makes, which
// lasts until the test has read it.
type run struct {
	*Client
	sleeps chan time.Duration
}

func start(t *testing.T, config Config) *run {
	t.Helper()
	c, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	r := &run{c, make(chan time.Duration)}
	c.sleep = func(ctx context.Context, d time.Duration) {
		select {
		case r.sleeps <- d:
		case <-ctx.Done():
		}
	}
	cause := errors.New("test is over")
	ctx, cancel := context.WithCancelCause(context.Background())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Errorf("Run = %v, want %v", err, cause)
		}
	})
	return r
}

func (r *run) slept(t *testing.T) time.Duration {
	t.Helper()
	select {
	case d := <-r.sleeps:
		return d
	case <-time.After(patience):
		t.Fatal("the client does not pause")
		return 0
	}
}

func (r *run) isReady() bool {
	select {
	case <-r.Ready():
		return true
	default:
		return false
	}
}

const typeA, typeB = "type/A", "type/B"

func TestStreamAcksAndNacks(t *testing.T) {
	s := newServer(t)
	a, b := newBook(), newBook()
	r := start(t, s.config(Subscription{typeA, a}, Subscription{typeB, b}))
	st := s.accept()

	first, err := st.s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	node := first.GetNode()
	if got, want := node.GetId(), "ztunnel~10.0.0.9~zt.istio-system~istio-system.svc.cluster.local"; got != want {
		t.Errorf("node id = %q, want %q", got, want)
	}
	wantMeta := map[string]any{"NAME": "zt", "NAMESPACE": "istio-system", "INSTANCE_IPS": "10.0.0.9", "NODE_NAME": "na", "A": "b", "N": 1.5}
	if diff := cmp.Diff(wantMeta, node.GetMetadata().AsMap()); diff != "" {
		t.Errorf("node metadata: -want +got\n%s", diff)
	}
	if first.GetTypeUrl() != typeA || len(first.GetResourceNamesSubscribe())+len(first.GetResourceNamesUnsubscribe())+len(first.GetInitialResourceVersions()) != 0 {
		t.Errorf("first request = %v, want an empty wildcard of %s", first, typeA)
	}
	st.want("wildcard", &request{TypeUrl: typeB})
	md := st.metadata()
	for key, want := range map[string]string{"authorization": "Bearer secret", "clusterid": "Kubernetes", "x-extra": "1"} {
		if got := md.Get(key); !slices.Equal(got, []string{want}) {
			t.Errorf("metadata %s = %q, want %q", key, got, want)
		}
	}

	st.send(&response{TypeUrl: typeA, Nonce: "1", Resources: []*resource{added("x", "v1", "X"), added("y", "v1", "bad"), added("z", "v1", "Z"), {Name: "w"}}})
	st.want("one malformed resource rejects itself alone", &request{TypeUrl: typeA, ResponseNonce: "1",
		ErrorDetail: &statuspb.Status{Message: "w: resource without a body; y: it is bad"}})
	a.want(t, "the rest is applied", map[string]string{"x": "X", "z": "Z"})
	st.send(&response{TypeUrl: typeB, Nonce: "2"})
	st.want("ack", &request{TypeUrl: typeB, ResponseNonce: "2"})
	if r.isReady() {
		t.Error("ready although no response of A was acked")
	}
	st.send(&response{TypeUrl: typeA, Nonce: "3", Resources: []*resource{added("x", "v2", "X2")}, RemovedResources: []string{"z", "unknown"}})
	st.want("ack", &request{TypeUrl: typeA, ResponseNonce: "3"})
	a.want(t, "updates and removals", map[string]string{"x": "X2"})
	if !r.isReady() {
		t.Error("not ready although both types were acked")
	}
	st.send(&response{TypeUrl: "type/unknown", Nonce: "4"})
	st.want("a type that was not asked for", &request{TypeUrl: "type/unknown", ResponseNonce: "4"})

	got := r.Stats()
	want := Stats{
		Connected:    true,
		Terminations: map[string]uint64{"ConnectionError": 0, "Error": 0, "Reconnect": 0, "Complete": 0},
		Types: map[string]TypeStats{
			typeA: {Messages: 2, Bytes: 7, Rejected: 2, Known: 1},
			typeB: {Messages: 1},
		},
		UnknownTypes: 1,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Stats: -want +got\n%s", diff)
	}
}

func TestReconnectReplaysVersions(t *testing.T) {
	s := newServer(t)
	a := newBook()
	r := start(t, s.config(Subscription{typeA, a}))
	st := s.accept()
	st.want("first", &request{TypeUrl: typeA})
	st.send(&response{TypeUrl: typeA, Nonce: "1", Resources: []*resource{
		added("kept", "v1", "K"), added("gone", "v1", "G"), added("late", "v1", "L"), added("never", "v1", "bad"), added("refused", "v1", "bad")}})
	st.want("nack", &request{TypeUrl: typeA, ResponseNonce: "1", ErrorDetail: &statuspb.Status{Message: "never: it is bad; refused: it is bad"}})
	st.send(&response{TypeUrl: typeA, Nonce: "2", Resources: []*resource{added("late", "v2", "bad")}, RemovedResources: []string{"gone"}})
	st.want("nack", &request{TypeUrl: typeA, ResponseNonce: "2", ErrorDetail: &statuspb.Status{Message: "late: it is bad"}})
	st.end <- nil
	r.slept(t)

	a.want(t, "state survives", map[string]string{"kept": "K", "late": "L"})
	st = s.accept()
	st.want("versions as held, without those of what was rejected", &request{TypeUrl: typeA,
		InitialResourceVersions: map[string]string{"kept": "v1", "late": "v1"}})
	// "never" was deleted meanwhile: nobody could tell the server that we know of it.
	a.mu.Lock()
	a.held["never"] = "a note of what was rejected"
	a.mu.Unlock()
	st.send(&response{TypeUrl: typeA, Nonce: "3", Resources: []*resource{added("late", "v3", "L3"), added("refused", "v2", "R")}})
	st.want("ack", &request{TypeUrl: typeA, ResponseNonce: "3"})
	a.want(t, "what the first response does not name is gone", map[string]string{"kept": "K", "late": "L3", "refused": "R"})
	st.end <- status.Error(codes.Internal, "boom")
	r.slept(t)
	st = s.accept()
	st.want("all good now", &request{TypeUrl: typeA, InitialResourceVersions: map[string]string{"kept": "v1", "late": "v3", "refused": "v2"}})
	if got := r.Stats().Terminations; got["Complete"] != 1 || got["Error"] != 1 {
		t.Errorf("terminations = %v", got)
	}
}

func TestEveryFailureSleepsLonger(t *testing.T) {
	s := newServer(t)
	refuse := errors.New("nobody listens")
	type step struct {
		name    string
		prepare func(*Config)
		play    func(*server)
		reason  string
	}
	end := func(err error) func(*server) {
		return func(s *server) { s.accept().end <- err }
	}
	steps := []step{
		{"connect fails", func(c *Config) {
			c.Dial = func(context.Context, string) (net.Conn, error) { return nil, refuse }
		}, nil, "ConnectionError"},
		{"root CA unreadable", func(c *Config) { c.RootCA = s.path("nowhere") }, nil, "Error"},
		{"root CA is no PEM", func(c *Config) { c.RootCA = s.path("token") }, nil, "Error"},
		{"token unreadable", func(c *Config) { c.Token = TokenFile(s.path("nowhere")) }, nil, "Error"},
		{"token empty", func(c *Config) { s.write("empty", []byte(" \n")); c.Token = TokenFile(s.path("empty")) }, nil, "Error"},
		{"token is not ASCII", func(c *Config) { c.Token = StaticToken("a\nb") }, nil, "Error"},
		{"certificate of another", func(c *Config) { c.Address = "other.test:15012" }, nil, "ConnectionError"},
		{"unauthenticated", func(*Config) {}, end(status.Error(codes.Unauthenticated, "no")), "Error"},
		{"stream ends at once", func(*Config) {}, end(nil), "Complete"},
		{"unknown", func(*Config) {}, end(status.Error(codes.Unknown, "x")), "Reconnect"},
		{"canceled", func(*Config) {}, end(status.Error(codes.Canceled, "x")), "Reconnect"},
		{"deadline", func(*Config) {}, end(status.Error(codes.DeadlineExceeded, "x")), "Reconnect"},
		{"transport closing", func(*Config) {}, end(status.Error(codes.Unavailable, "transport is closing")), "Reconnect"},
		{"goaway", func(*Config) {}, end(status.Error(codes.Unavailable, "x, received prior goaway: y")), "Reconnect"},
		{"unavailable", func(*Config) {}, end(status.Error(codes.Unavailable, "x")), "Error"},
	}
	for _, tt := range steps {
		t.Run(tt.name, func(t *testing.T) {
			config := s.config(Subscription{typeA, newBook()})
			tt.prepare(&config)
			r := start(t, config)
			for i, want := range []time.Duration{20 * time.Millisecond, 40 * time.Millisecond, 80 * time.Millisecond} {
				if tt.play != nil {
					tt.play(s)
				}
				if got := r.slept(t); got < want/2 || got > want {
					t.Errorf("pause %d = %v, want between %v and %v", i, got, want/2, want)
				}
			}
			if got := r.Stats().Terminations[tt.reason]; got < 3 {
				t.Errorf("terminations = %v, want 3 of %s", r.Stats().Terminations, tt.reason)
			}
		})
	}
}

func TestDelayIsCapped(t *testing.T) {
	s := newServer(t)
	config := s.config(Subscription{typeA, newBook()})
	config.RootCA = s.path("nowhere")
	r := start(t, config)
	var d time.Duration
	for range 20 {
		d = r.slept(t)
	}
	if d < maxDelay/2 || d > maxDelay {
		t.Errorf("20th pause = %v, want between %v and %v", d, maxDelay/2, maxDelay)
	}
}

func TestRootsAndTokenAreReadAgain(t *testing.T) {
	s := newServer(t)
	good, err := loadFile(s.path("root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	_, other := newCertificate(t, "istiod.test")
	s.write("root.pem", other)
	r := start(t, s.config(Subscription{typeA, newBook()}))
	r.slept(t)
	if got := r.Stats().Terminations["ConnectionError"]; got != 1 {
		t.Fatalf("terminations = %v, want one ConnectionError", r.Stats().Terminations)
	}
	r.slept(t)
	s.write("root.pem", good)
	s.write("token", []byte("second"))
	for {
		select {
		case <-r.sleeps:
			continue
		case st := <-s.streams:
			if got := st.metadata().Get("authorization"); !slices.Equal(got, []string{"Bearer second"}) {
				t.Errorf("authorization = %q", got)
			}
			return
		case <-time.After(patience):
			t.Fatal("no stream with the right root")
		}
	}
}

func loadFile(path string) ([]byte, error) {
	token, err := TokenFile(path)()
	return []byte(token), err
}

func TestAlternativeHostname(t *testing.T) {
	s := newServer(t)
	for _, tt := range []struct {
		address, alt string
		ok           bool
	}{
		{"localhost:15012", "istiod.test", true},
		{"istiod.test:15012", "localhost", true},
		{"localhost:15012", "other.test", false},
	} {
		t.Run(fmt.Sprint(tt.address, " or ", tt.alt), func(t *testing.T) {
			config := s.config(Subscription{typeA, newBook()})
			config.Address, config.AltHostname = tt.address, tt.alt
			r := start(t, config)
			if tt.ok {
				s.accept()
			} else if r.slept(t); r.Stats().Terminations["ConnectionError"] != 1 {
				t.Errorf("terminations = %v, want one ConnectionError", r.Stats().Terminations)
			}
		})
	}
}

func TestLimitsRejectResourceByResource(t *testing.T) {
	s := newServer(t)
	a := newBook()
	config := s.config(Subscription{typeA, a})
	config.Limits = Limits{Resources: 3, ResourceBytes: 10, TotalBytes: 25}
	start(t, config)
	st := s.accept()
	st.want("first", &request{TypeUrl: typeA})
	long := strings.Repeat("n", maxName+1)
	st.send(&response{TypeUrl: typeA, Nonce: "1", Resources: []*resource{
		added("a", "", "0123456789"), added("b", "", "0123456789x"), added("b", "", "0123456789"), added("c", "", "012345"), added("c", "", "0"),
		added("d", "", "0"), added("a", "", "1"), added("e", strings.Repeat("v", maxVersion+1), ""), added(long, "", "")}})
	st.want("nack", &request{TypeUrl: typeA, ResponseNonce: "1", ErrorDetail: &statuspb.Status{Message: strings.Join([]string{
		"b: resource too large", "c: resources too large together", "d: too many resources", "e: name or version too long", long[:256] + ": name or version too long"}, "; ")}})
	a.want(t, "the rest is applied", map[string]string{"a": "1", "b": "0123456789", "c": "0"})
	st.send(&response{TypeUrl: typeA, Nonce: "2", Resources: []*resource{added("d", "", "0"), added("a", "", "2")}, RemovedResources: []string{"b"}})
	st.want("still full", &request{TypeUrl: typeA, ResponseNonce: "2", ErrorDetail: &statuspb.Status{Message: "d: too many resources"}})
	st.send(&response{TypeUrl: typeA, Nonce: "3", Resources: []*resource{added("d", "", "0123456789")}})
	st.want("room again", &request{TypeUrl: typeA, ResponseNonce: "3"})
}

func TestNackMessageIsBounded(t *testing.T) {
	var rejected []Rejection
	for i := range 100_000 {
		rejected = append(rejected, Rejection{fmt.Sprintf("resource-%d-\xff", i), errors.New("no")})
	}
	m := nack(rejected).GetMessage()
	if len(m) > maxNackMessage+64 || !strings.HasPrefix(m, "resource-0-?: no; resource-1-?: no; ") || !strings.Contains(m, " more") {
		t.Errorf("nack of %d bytes: %.64q ... %q", len(m), m, m[len(m)-32:])
	}
}

func TestInitialVersionsAreBounded(t *testing.T) {
	sub := newSubscription(Subscription{typeA, newBook()}, &Limits{})
	for i := range 100_000 {
		sub.known[fmt.Sprintf("cluster1//Pod/some-namespace/some-longer-name-%d", i)] = known{version: "0123456789abcdef"}
	}
	req := sub.initial()
	if n := len(req.GetInitialResourceVersions()); n == 0 || n+len(sub.unechoed) != len(sub.known) {
		t.Errorf("%d echoed and %d not, want %d together", n, len(sub.unechoed), len(sub.known))
	}
	size := 0
	for k, v := range req.GetInitialResourceVersions() {
		size += len(k) + len(v) + 8
	}
	if size > 4<<20 {
		t.Errorf("request of %d bytes: gRPC servers refuse more than 4 MiB", size)
	}
}

func TestNewNamesEveryProblem(t *testing.T) {
	_, err := New(Config{Address: "nowhere", Subscriptions: []Subscription{{"t", newBook()}, {"t", newBook()}}, Headers: [][2]string{{"a b", "c"}, {"d", "\n"}}})
	for _, want := range []string{"missing port", "no root CA", `"t"`, `"a b"`, `"d"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New = %v, want it to name %s", err, want)
		}
	}
	if _, err := New(Config{Address: "a:1", RootCA: "SYSTEM", Subscriptions: []Subscription{{"t", newBook()}}, Node: Node{JSON: map[string]any{"k": io.EOF}}}); err == nil {
		t.Error("New accepts node metadata that is no JSON")
	}
}
