package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

const patience = 20 * time.Second // a test that waits longer has failed

// meshYAML is a mesh of two nodes: web on n1, client and db on n2.
var meshYAML = map[string]string{"mesh.yaml": `
apiVersion: v1
kind: Namespace
metadata: {name: x, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: x, labels: {app: web}}
spec: {nodeName: n1, serviceAccountName: web}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: x}
spec: {nodeName: n2, serviceAccountName: client}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: x}
spec: {selector: {app: web}, clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: x}
spec: {}
`}

const dbYAML = "apiVersion: v1\nkind: Pod\nmetadata: {name: db, namespace: x}\nspec: {nodeName: n2, serviceAccountName: db}\nstatus: {podIP: 10.0.0.3}"

// Resource names of meshYAML.
const (
	webUID    = "Kubernetes//Pod/x/web"
	clientUID = "Kubernetes//Pod/x/client"
	dbUID     = "Kubernetes//Pod/x/db"
	webKey    = "x/web.x.svc.cluster.local"
)

// with returns meshYAML and more files.
func with(more map[string]string) map[string]string {
	files := map[string]string{"mesh.yaml": meshYAML["mesh.yaml"]}
	for k, v := range more {
		files[k] = v
	}
	return files
}

// server is a running control plane.
type server struct {
	*Server
	t      *testing.T
	addr   string
	static *Static
}

func serve(t *testing.T, cfg Config) *server {
	t.Helper()
	s := &server{t: t, static: cfg.Static}
	if cfg.Static == nil && cfg.Dir == "" {
		s.static = NewStatic(meshYAML)
		cfg.Static = s.static
	}
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Server, s.addr = srv, l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s
}

// set replaces the files, and waits until they are read.
func (s *server) set(files map[string]string) Report {
	s.t.Helper()
	s.static.Set(files)
	r, _ := s.Reload(s.t.Context())
	return r
}

func (s *server) token(node string) string {
	s.t.Helper()
	token, err := s.Token(node, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

// dial connects with the roots of the server.
func (s *server) dial() *grpc.ClientConn {
	s.t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(s.RootPEM()) {
		s.t.Fatal("no roots")
	}
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool})))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// proxy is a raw ADS client.
type proxy struct {
	t      *testing.T
	ads    discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	node   string
	cancel context.CancelFunc
}

func (s *server) connect(node, token string) *proxy {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	s.t.Cleanup(cancel)
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	ads, err := discovery.NewAggregatedDiscoveryServiceClient(s.dial()).DeltaAggregatedResources(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	return &proxy{t: s.t, ads: ads, node: node, cancel: cancel}
}

func (p *proxy) send(req *discovery.DeltaDiscoveryRequest) {
	p.t.Helper()
	if err := p.ads.Send(req); err != nil {
		p.t.Fatal(err)
	}
}

// subscribe sends the first request of a type.
func (p *proxy) subscribe(typeURL string, versions map[string]string, names ...string) {
	p.t.Helper()
	meta, err := structpb.NewStruct(map[string]any{"NODE_NAME": p.node})
	if err != nil {
		p.t.Fatal(err)
	}
	req := &discovery.DeltaDiscoveryRequest{Node: &core.Node{Id: "ztunnel~1.2.3.4~z.y~y.svc.cluster.local", Metadata: meta}, TypeUrl: typeURL, InitialResourceVersions: versions}
	if len(names) > 0 && names[0] == "on demand" {
		req.ResourceNamesSubscribe, req.ResourceNamesUnsubscribe = []string{"*"}, []string{"*"}
		names = names[1:]
	}
	req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, names...)
	p.send(req)
}

// want receives a response, compares it, and acknowledges it.
func (p *proxy) want(why, typeURL string, names, removed []string) *discovery.DeltaDiscoveryResponse {
	p.t.Helper()
	resp := p.receive(why, typeURL, names, removed)
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: resp.Nonce})
	return resp
}

func (p *proxy) receive(why, typeURL string, names, removed []string) *discovery.DeltaDiscoveryResponse {
	p.t.Helper()
	resp, err := p.ads.Recv()
	if err != nil {
		p.t.Fatalf("%s: %v", why, err)
	}
	var got []string
	for _, r := range resp.Resources {
		got = append(got, r.Name)
		if r.Version == "" || r.Resource.TypeUrl != typeURL {
			p.t.Errorf("%s: resource %v", why, r)
		}
	}
	if resp.TypeUrl != typeURL || !slices.Equal(got, names) || !slices.Equal(resp.RemovedResources, removed) {
		p.t.Fatalf("%s: %s, names %q, removed %q; want %s, %q, %q", why, resp.TypeUrl, got, resp.RemovedResources, typeURL, names, removed)
	}
	return resp
}

// wantEnd receives until the stream ends, and compares how.
func (p *proxy) wantEnd(why string, code codes.Code, text string) {
	p.t.Helper()
	for {
		if _, err := p.ads.Recv(); err != nil {
			if status.Code(err) != code || !strings.Contains(err.Error(), text) {
				p.t.Errorf("%s: ended with %v, want %v %q", why, err, code, text)
			}
			return
		}
	}
}

func versions(resps ...*discovery.DeltaDiscoveryResponse) map[string]string {
	out := make(map[string]string)
	for _, resp := range resps {
		for _, r := range resp.Resources {
			out[r.Name] = r.Version
		}
	}
	return out
}

// eventually waits until what holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestWildcardGetsEverythingThenOnlyChanges(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, nil)
	first := p.want("first", typeAddress, []string{clientUID, webUID, webKey}, nil)
	if got := first.Resources[2].Aliases; !slices.Equal(got, []string{"/10.96.0.1"}) {
		t.Errorf("aliases of the service %q", got)
	}

	s.set(with(map[string]string{"db.yaml": dbYAML}))
	p.want("a pod came", typeAddress, []string{dbUID}, nil)
	s.set(with(map[string]string{"db.yaml": strings.Replace(dbYAML, "10.0.0.3", "10.0.0.4", 1)}))
	p.want("it changed", typeAddress, []string{dbUID}, nil)
	s.set(meshYAML)
	p.want("it left", typeAddress, nil, []string{dbUID})
}

// Were a policy sent after a workload that names it, or taken away before it,
// the proxy would refuse connections in between.
func TestPoliciesComeBeforeAndGoAfterTheWorkloadsThatNameThem(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, nil)
	p.want("addresses", typeAddress, []string{clientUID, webUID, webKey}, nil)
	p.subscribe(typeAuthorization, nil)
	policies := p.receive("policies", typeAuthorization, []string{"x/p"}, nil)

	q := with(map[string]string{"p.yaml": "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: q, namespace: x}\nspec: {selector: {matchLabels: {app: web}}}"})
	s.set(q)
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAuthorization, ResponseNonce: policies.Nonce})
	p.want("the policy, though workloads had no response under way", typeAuthorization, []string{"x/q"}, nil)
	p.want("the workload that names it", typeAddress, []string{webUID}, nil)

	s.set(with(map[string]string{"db.yaml": dbYAML, "p.yaml": strings.Replace(q["p.yaml"], "name: q", "name: r", 1)}))
	p.want("the new policy", typeAuthorization, []string{"x/r"}, nil)
	p.want("the workload now names that one", typeAddress, []string{dbUID, webUID}, nil)
	p.want("nobody names the old one", typeAuthorization, nil, []string{"x/q"})
	s.set(meshYAML)
	p.want("nor this one", typeAddress, []string{webUID}, []string{dbUID})
	p.want("so it goes too", typeAuthorization, nil, []string{"x/r"})
}

func TestReconnectGetsOnlyTheDifference(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, nil)
	known := versions(p.want("first", typeAddress, []string{clientUID, webUID, webKey}, nil))
	p.cancel()

	p = s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, known)
	p.want("nothing changed", typeAddress, nil, nil)
	p.cancel()

	known[webUID] = "0"
	known["Kubernetes//Pod/x/gone"] = "1"
	delete(known, clientUID)
	p = s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, known)
	p.want("one changed, one new, one gone", typeAddress, []string{clientUID, webUID}, []string{"Kubernetes//Pod/x/gone"})
}

func TestVersionsFollowContents(t *testing.T) {
	read := func(files map[string]string) map[string]string {
		w, r := Check(Config{Static: NewStatic(files)})
		if err := r.Err(); err != nil {
			t.Fatal(err)
		}
		out := make(map[string]string)
		for name, r := range w.resources[typeAddress] {
			out[name] = r.version
		}
		return out
	}
	a, b := read(meshYAML), read(map[string]string{"other-name.yaml": "# moved\n" + meshYAML["mesh.yaml"]})
	for name, v := range a {
		if b[name] != v {
			t.Errorf("%s: %s, then %s", name, v, b[name])
		}
	}
	if c := read(map[string]string{"f.yaml": strings.Replace(meshYAML["mesh.yaml"], "10.0.0.1", "10.0.0.9", 1)}); c[webUID] == a[webUID] || c[clientUID] != a[clientUID] {
		t.Errorf("versions %v, then %v", a, c)
	}
}

func TestOnDemandByNameAndAlias(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n1", s.token("n1"))
	ask := func(name string) {
		p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResourceNamesSubscribe: []string{name}})
	}
	p.subscribe(typeAddress, nil, "on demand")
	p.want("its own node's pods come unasked", typeAddress, []string{webUID}, nil)
	ask("/10.0.0.2")
	p.want("a workload by address", typeAddress, []string{clientUID}, nil)
	ask("/10.9.9.9")
	p.want("nobody has it", typeAddress, nil, []string{"/10.9.9.9"})
	ask(webKey)
	p.want("a service with its workloads", typeAddress, []string{webUID, webKey}, nil)
	ask("/10.96.0.1")
	p.want("a service by address, again though known", typeAddress, []string{webUID, webKey}, nil)
	ask(dbUID)
	p.want("a workload that is not there yet", typeAddress, nil, []string{dbUID})
	s.set(with(map[string]string{"db.yaml": dbYAML, "new.yaml": strings.NewReplacer("db", "new", ".3", ".5").Replace(dbYAML)}))
	p.want("it came; what nobody asked for does not", typeAddress, []string{dbUID}, nil)
	s.set(meshYAML)
	p.want("it left", typeAddress, nil, []string{dbUID})

	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResourceNamesUnsubscribe: []string{"/10.0.0.2"}, ResourceNamesSubscribe: []string{"/10.7.7.7"}})
	p.want("one is no longer wanted, another does not exist", typeAddress, nil, []string{"/10.7.7.7", clientUID})
	s.set(map[string]string{"mesh.yaml": strings.NewReplacer("10.0.0.2", "10.0.0.7", "10.0.0.1", "10.0.0.6").Replace(meshYAML["mesh.yaml"])})
	p.want("what is no longer wanted does not come", typeAddress, []string{webUID}, nil)
}

func TestOnDemandWithNothingToSayIsAnswered(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n3", s.token("n3"))
	p.subscribe(typeAddress, nil, "on demand")
	p.want("empty", typeAddress, nil, nil)
}

func TestOnDemandReconnect(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n3", s.token("n3"))
	p.subscribe(typeAddress, map[string]string{clientUID: "0", "Kubernetes//Pod/x/gone": "1", "/10.0.0.1": "", "/10.8.8.8": ""}, "on demand")
	p.want("known, gone and pending", typeAddress, []string{clientUID, webUID}, []string{"/10.8.8.8", "Kubernetes//Pod/x/gone"})
}

func TestWildcardByStar(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, nil, "*")
	p.want("everything", typeAddress, []string{clientUID, webUID, webKey}, nil)
}

// A client that is slow to acknowledge finds the latest state next, not a queue.
func TestChangesCoalesceWhileAClientIsBusy(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, nil)
	resp := p.receive("first", typeAddress, []string{clientUID, webUID, webKey}, nil)
	for _, addr := range []string{".4", ".5", ".6"} {
		s.set(with(map[string]string{"db.yaml": strings.Replace(dbYAML, ".3", addr, 1)}))
	}
	s.set(with(map[string]string{"new.yaml": strings.NewReplacer("db", "new").Replace(dbYAML)}))
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResponseNonce: "stale"})
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResponseNonce: resp.Nonce})
	p.want("the difference to the latest", typeAddress, []string{"Kubernetes//Pod/x/new"}, nil)
}

func TestNackIsKeptWithNodeAndReason(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, nil)
	resp := p.receive("first", typeAddress, []string{clientUID, webUID, webKey}, nil)
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResponseNonce: resp.Nonce, ErrorDetail: &rpcstatus.Status{Message: webUID + ": bad " + strings.Repeat("x", 2*maxMessageBytes)}})
	s.set(with(map[string]string{"db.yaml": dbYAML}))
	p.want("the next change comes, the rejected one is not repeated", typeAddress, []string{dbUID}, nil)
	eventually(t, "both are counted", func() bool {
		st := s.Status()
		return len(st.Clients) == 1 && st.Clients[0].Nacked["Address"] == 1 && st.Clients[0].Acked["Address"] == 1 && st.Clients[0].Sent["Address"] == 2
	})
	st := s.Status()
	if len(st.Nacks) != 1 || st.Nacks[0].Node != "n1" || st.Nacks[0].Type != "Address" || !strings.HasPrefix(st.Nacks[0].Message, webUID+": bad") || len(st.Nacks[0].Message) > maxMessageBytes+8 {
		t.Errorf("nacks %+v", st.Nacks)
	}
	if st.Clients[0].Node != "n1" || !strings.HasPrefix(st.Clients[0].NodeID, "ztunnel~") {
		t.Errorf("client %+v", st.Clients[0])
	}
	p.cancel()
	eventually(t, "the client is gone", func() bool { return len(s.Status().Clients) == 0 })
}

func TestOtherTypesAreRefused(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n1", s.token("n1"))
	p.subscribe("type.googleapis.com/envoy.config.cluster.v3.Cluster", nil)
	p.wantEnd("clusters", codes.InvalidArgument, "not served")
}

func TestNamesAndStreamsAreBounded(t *testing.T) {
	s := serve(t, Config{Limits: Limits{Names: 2, StreamsPerNode: 1}})
	p := s.connect("n3", s.token("n3"))
	p.subscribe(typeAddress, nil, "on demand", "a", "b")
	p.want("two", typeAddress, nil, []string{"a", "b"})
	second := s.connect("n3", s.token("n3"))
	second.wantEnd("a second stream", codes.ResourceExhausted, "streams already")
	p.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress, ResourceNamesSubscribe: []string{"c"}})
	p.wantEnd("three names", codes.ResourceExhausted, "more than 2 names")
}

func TestNothingIsAnsweredBeforeTheFirstGoodState(t *testing.T) {
	static := NewStatic(map[string]string{"f.yaml": "broken: ["})
	s := serve(t, Config{Static: static})
	s.static = static
	if s.World() != nil || s.Status().Last.Used {
		t.Error("a broken directory is served")
	}
	p := s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, nil)
	eventually(t, "the proxy is connected", func() bool { return len(s.Status().Clients) == 1 })
	_, err := s.certificate(s.token("n1"), "spiffe://cluster.local/ns/x/sa/web", newCSR(t))
	if status.Code(err) != codes.Unavailable {
		t.Errorf("certificate: %v", err)
	}
	if got := s.Status().Clients[0].Sent["Address"]; got != 0 {
		t.Errorf("%d responses", got)
	}
	s.set(meshYAML)
	p.want("now", typeAddress, []string{clientUID, webUID, webKey}, nil)
}

func TestTokensAreChecked(t *testing.T) {
	s := serve(t, Config{})
	other := serve(t, Config{})
	now := time.Now()
	key := s.trust.Load().tokenKey
	mint := func(ttl time.Duration, at time.Time) string {
		token, err := mintToken(key, "n1", ttl, at)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	for _, tc := range []struct{ name, token, text string }{
		{"none", "", "exactly one authorization header"},
		{"garbage", "garbage", "malformed"},
		{"three dots", "a.b.c", "malformed"},
		{"long", strings.Repeat("a", maxTokenBytes+1), "too long"},
		{"expired", mint(time.Minute, now.Add(-time.Hour)), "expired at"},
		{"another control plane's", other.token("n1"), "not signed by this control plane"},
		{"another audience", forge(t, key, func(c *nodeClaims) { c.Audience = []string{"else"} }), "meant for others"},
		{"no audience", forge(t, key, func(c *nodeClaims) { c.Audience = nil }), ""},
		{"another issuer", forge(t, key, func(c *nodeClaims) { c.Issuer = "else" }), "not issued by"},
		{"no expiry", forge(t, key, func(c *nodeClaims) { c.ExpiresAt = nil }), ""},
		{"no node", forge(t, key, func(c *nodeClaims) { c.Node = "" }), "names no node"},
		{"unsigned", unsigned(t), ""},
		{"keyed with the public key", hmacForged(t, key), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := *s
			s.t = t
			p := s.connect("n1", tc.token)
			p.wantEnd("stream", codes.Unauthenticated, tc.text)
			if _, err := s.certificate(tc.token, "spiffe://cluster.local/ns/x/sa/web", newCSR(t)); status.Code(err) != codes.Unauthenticated {
				t.Errorf("certificate: %v", err)
			}
		})
	}
	t.Run("good, with a newline", func(t *testing.T) {
		if node, _, err := verifyToken(s.trust.Load().tokenKey.Public().(ed25519Public), strings.TrimSpace(s.token("n1")+"\n"), now); err != nil || node != "n1" {
			t.Errorf("%q, %v", node, err)
		}
	})
}

func TestAnotherNodesTokenIsRefused(t *testing.T) {
	s := serve(t, Config{})
	p := s.connect("n2", s.token("n1"))
	p.subscribe(typeAddress, nil)
	p.wantEnd("n2 with the token of n1", codes.PermissionDenied, "the token is for node n1, the proxy says n2")
}

func TestStreamEndsWithItsToken(t *testing.T) {
	s := serve(t, Config{})
	token, err := s.Token("n1", 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	p := s.connect("n1", token)
	p.subscribe(typeAddress, nil)
	p.want("first", typeAddress, []string{clientUID, webUID, webKey}, nil)
	p.wantEnd("two seconds later", codes.Unauthenticated, "expired while the stream was open")
}

func TestStreamOfABusyClientEndsWithItsTokenToo(t *testing.T) {
	s := serve(t, Config{})
	token, err := s.Token("n1", 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	p := s.connect("n1", token)
	p.subscribe(typeAddress, nil) // and never reads, nor acknowledges
	eventually(t, "the proxy is connected", func() bool { return len(s.Status().Clients) == 1 })
	eventually(t, "the proxy is gone", func() bool { return len(s.Status().Clients) == 0 })
}

func TestPlaintextAndOtherRootsAreRefused(t *testing.T) {
	s, other := serve(t, Config{}), serve(t, Config{})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(other.RootPEM())
	if c, err := tls.Dial("tcp", s.addr, &tls.Config{RootCAs: pool}); err == nil {
		c.Close()
		t.Error("a client of another root connected")
	}
	pool.AppendCertsFromPEM(s.RootPEM())
	if c, err := tls.Dial("tcp", s.addr, &tls.Config{RootCAs: pool, MaxVersion: tls.VersionTLS12}); err == nil {
		c.Close()
		t.Error("TLS 1.2 connected")
	}
	c, err := tls.Dial("tcp", s.addr, &tls.Config{RootCAs: pool, ServerName: "localhost", NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestServeStopsWithItsStreams(t *testing.T) {
	srv, err := New(Config{Static: NewStatic(meshYAML)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	s := &server{Server: srv, t: t, addr: l.Addr().String()}
	p := s.connect("n1", s.token("n1"))
	p.subscribe(typeAddress, nil)
	p.want("first", typeAddress, []string{clientUID, webUID, webKey}, nil)
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
	p.wantEnd("stopped", codes.Unavailable, "")
	if err := srv.Serve(t.Context(), l); err == nil {
		t.Error("Serve served twice")
	}
}

func TestReloadKeepsTheLastGoodState(t *testing.T) {
	var reports []Report
	static := NewStatic(meshYAML)
	s := serve(t, Config{Static: static, OnLoad: func(r Report) { reports = append(reports, r) }})
	s.static = static
	good := s.World()
	r := s.set(with(map[string]string{"bad.yaml": "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodename: x}"}))
	if r.Used || s.World() != good || !hasProblem(r, "bad.yaml:4: spec.nodename: ", "nodeName") {
		t.Errorf("report %+v", r)
	}
	if st := s.Status(); st.Last.Used || !st.Serving.Used {
		t.Errorf("status %+v", st)
	}
	if r := s.set(with(map[string]string{"db.yaml": dbYAML})); !r.Used || s.World() == good {
		t.Errorf("report %+v", r)
	}
	if len(reports) < 3 || !reports[0].Used {
		t.Errorf("%d reports", len(reports))
	}
}

func TestDirectoryIsFollowed(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("mesh.yaml", meshYAML["mesh.yaml"])
	s := serve(t, Config{Dir: dir, Debounce: 10 * time.Millisecond, Rescan: time.Hour})
	has := func(name string) func() bool {
		return func() bool { return s.World().resources[typeAddress][name] != nil }
	}
	write("db.yaml", dbYAML)
	eventually(t, "a file is taken up", has(dbUID))
	write("sub/new.yaml", strings.NewReplacer("db", "new", ".3", ".5").Replace(dbYAML))
	eventually(t, "a file in a new directory is taken up", has("Kubernetes//Pod/x/new"))
	write("sub/more.yaml", strings.NewReplacer("db", "more", ".3", ".6").Replace(dbYAML))
	eventually(t, "and the next one there", has("Kubernetes//Pod/x/more"))
	if err := os.Remove(filepath.Join(dir, "db.yaml")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a file that is gone is forgotten", func() bool { return !has(dbUID)() })
	write("bad.yaml", "a: [")
	eventually(t, "a broken file is reported", func() bool { return !s.Status().Last.Used })
	if !has(webUID)() {
		t.Error("the last good state is lost")
	}
}

// A mounted ConfigMap: files are links into ..data, a link that is swapped.
func TestMountedConfigMapIsFollowed(t *testing.T) {
	dir := t.TempDir()
	version := func(n, text string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, n), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, n, "mesh.yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(n, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", meshYAML["mesh.yaml"])
	if err := os.Symlink("..data/mesh.yaml", filepath.Join(dir, "mesh.yaml")); err != nil {
		t.Fatal(err)
	}
	s := serve(t, Config{Dir: dir, Debounce: 10 * time.Millisecond, Rescan: time.Hour})
	if n := s.Status().Serving.Counts.Files; n != 1 {
		t.Errorf("%d files", n)
	}
	version("..2", meshYAML["mesh.yaml"]+"---\n"+dbYAML)
	eventually(t, "the new version is taken up", func() bool { return s.World().resources[typeAddress][dbUID] != nil })
}

// A directory that is itself a link, swapped.
func TestSwappedDirectoryIsFollowed(t *testing.T) {
	base := t.TempDir()
	for _, v := range []string{"v1", "v2"} {
		if err := os.Mkdir(filepath.Join(base, v), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(base, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	link := func(v string) {
		t.Helper()
		if err := os.Symlink(v, filepath.Join(base, "tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(base, "tmp"), filepath.Join(base, "current")); err != nil {
			t.Fatal(err)
		}
	}
	write("v1/f.yaml", meshYAML["mesh.yaml"])
	write("v2/f.yaml", meshYAML["mesh.yaml"]+"---\n"+dbYAML)
	link("v1")
	s := serve(t, Config{Dir: filepath.Join(base, "current"), Debounce: 10 * time.Millisecond, Rescan: time.Hour})
	link("v2")
	eventually(t, "v2 is taken up", func() bool { return s.World().resources[typeAddress][dbUID] != nil })
	write("v2/f.yaml", meshYAML["mesh.yaml"])
	eventually(t, "changes in v2 are taken up", func() bool { return s.World().resources[typeAddress][dbUID] == nil })
}

func TestRescanFindsWhatNobodyTold(t *testing.T) {
	static := NewStatic(meshYAML)
	s := serve(t, Config{Static: static, Rescan: 10 * time.Millisecond})
	static.mu.Lock()
	static.files = with(map[string]string{"db.yaml": dbYAML})
	static.mu.Unlock()
	eventually(t, "the change is found", func() bool { return s.World().resources[typeAddress][dbUID] != nil })
}

func TestServiceAddressesSurviveARestart(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	svc := func(names ...string) *Static {
		var parts []string
		for _, n := range names {
			parts = append(parts, "apiVersion: v1\nkind: Service\nmetadata: {name: "+n+"}\nspec: {ports: [{port: 1}]}")
		}
		return NewStatic(map[string]string{"f.yaml": docs(parts...)})
	}
	addrs := func(st *Static) map[string]string {
		t.Helper()
		srv, err := New(Config{Static: st, State: state})
		if err != nil {
			t.Fatal(err)
		}
		out := make(map[string]string)
		for _, a := range srv.World().Services() {
			out[a.Name] = a.Addrs[0].String()
		}
		return out
	}
	before := addrs(svc("b", "c"))
	after := addrs(svc("a", "b", "c", "d"))
	for name, addr := range before {
		if after[name] != addr {
			t.Errorf("%s moved from %s to %s", name, addr, after[name])
		}
	}
}
