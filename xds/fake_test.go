package xds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type (
	request  = discoveryv3.DeltaDiscoveryRequest
	response = discoveryv3.DeltaDiscoveryResponse
	resource = discoveryv3.Resource
)

const patience = 20 * time.Second

// A server plays the control plane: each stream is handed to the test, which
// says what happens on it and ends it by the error that it sends to end.
type server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	t        *testing.T
	listener *bufconn.Listener
	streams  chan *stream
	dir      string // root.pem is the CA, token the token.
}

type stream struct {
	t   *testing.T
	s   discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	end chan error
}

func (s *server) DeltaAggregatedResources(gs discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	st := &stream{s.t, gs, make(chan error, 1)}
	select {
	case s.streams <- st:
	case <-gs.Context().Done():
		return gs.Context().Err()
	}
	select {
	case err := <-st.end:
		return err
	case <-gs.Context().Done():
		return gs.Context().Err()
	}
}

// newServer serves until the test ends, as istiod.test.
func newServer(t *testing.T) *server {
	s := &server{t: t, listener: bufconn.Listen(1 << 20), streams: make(chan *stream), dir: t.TempDir()}
	cert, root := newCertificate(t, "istiod.test")
	s.write("root.pem", root)
	s.write("token", []byte("secret\n"))
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}})))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve(s.listener)
	}()
	t.Cleanup(func() {
		g.Stop()
		<-done
	})
	return s
}

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

func (s *server) write(name string, b []byte) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) config(subs ...Subscription) Config {
	return Config{
		Address:       "https://istiod.test:15012",
		RootCA:        s.path("root.pem"),
		Token:         TokenFile(s.path("token")),
		ClusterID:     "Kubernetes",
		Headers:       [][2]string{{"X-Extra", "1"}},
		Node:          Node{PodName: "zt", Namespace: "istio-system", IP: "10.0.0.9", NodeName: "na", Metadata: map[string]string{"A": "b"}, JSON: map[string]any{"N": 1.5}},
		Subscriptions: subs,
		Dial:          func(ctx context.Context, _ string) (net.Conn, error) { return s.listener.DialContext(ctx) },
	}
}

func (s *server) accept() *stream {
	s.t.Helper()
	select {
	case st := <-s.streams:
		return st
	case <-time.After(patience):
		s.t.Fatal("no stream was opened")
		return nil
	}
}

// want receives one request and compares it, less the node.
func (st *stream) want(why string, want *request) {
	st.t.Helper()
	got, err := st.s.Recv()
	if err != nil {
		st.t.Fatalf("%s: Recv: %v", why, err)
	}
	got.Node = nil
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		st.t.Fatalf("%s: -want +got\n%s", why, diff)
	}
}

func (st *stream) send(r *response) {
	st.t.Helper()
	if err := st.s.Send(r); err != nil {
		st.t.Fatal(err)
	}
}

func (st *stream) metadata() metadata.MD {
	md, _ := metadata.FromIncomingContext(st.s.Context())
	return md
}

func added(name, version, body string) *resource {
	return &resource{Name: name, Version: version, Resource: &anypb.Any{Value: []byte(body)}}
}

// newCertificate returns a server certificate and the PEM of the CA that made it.
func newCertificate(t *testing.T, name string) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "test"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		DNSNames:              []string{name},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
