package fuzz

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/mesh"
)

// types are what the client subscribes to, in its order.
var types = [2]string{xds.AddressType, xds.AuthorizationType}

// Indexes of types.
const (
	addresses = iota
	policies
)

// A plane is a control plane and the real client of it with its store, joined
// in memory. It lives inside of a synctest bubble, so that pauses between
// streams cost nothing.
type plane struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	t        *testing.T
	listener *bufconn.Listener
	streams  chan *stream
	store    *mesh.Store
	client   *xds.Client
	stop     func() // ends all, and waits for it
}

// A stream is what the test answers; ending it takes an error, or nil.
type stream struct {
	t   *testing.T
	s   discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	end chan error
}

func newPlane(t *testing.T, config mesh.Config, limits xds.Limits) *plane {
	cert, root := planeCertificate()
	p := &plane{t: t, listener: bufconn.Listen(1 << 20), streams: make(chan *stream), store: mesh.NewStore(config)}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}})), grpc.ForceServerCodec(rawCodec{}))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(server, p)
	var err error
	p.client, err = xds.New(xds.Config{
		Address: "https://istiod.test:15012", RootCA: root, Limits: limits,
		Node: xds.Node{PodName: "zt", Namespace: "istio-system", IP: "10.0.0.9", NodeName: localNode},
		Subscriptions: []xds.Subscription{
			{Type: xds.AddressType, Handler: p.store.Addresses()},
			{Type: xds.AuthorizationType, Handler: p.store.Authorizations()},
		},
		Dial: func(ctx context.Context, _ string) (net.Conn, error) { return p.listener.DialContext(ctx) },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { _ = server.Serve(p.listener) })
	all.Go(func() { _ = p.client.Run(ctx) })
	p.stop = func() { cancel(); server.Stop(); all.Wait() }
	return p
}

// DeltaAggregatedResources hands each stream to the test.
func (p *plane) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	st := &stream{p.t, s, make(chan error, 1)}
	select {
	case p.streams <- st:
	case <-s.Context().Done():
		return nil
	}
	select {
	case err := <-st.end:
		return err
	case <-s.Context().Done():
		return nil
	}
}

// accept takes the client's next stream and its first requests, one for each
// of types. A stream that the client gave up meanwhile is passed over.
func (p *plane) accept() (st *stream, first [2]*discoveryv3.DeltaDiscoveryRequest) {
	p.t.Helper()
next:
	for st := range p.streams {
		for i := range types {
			r, err := st.s.Recv()
			if err != nil {
				continue next
			}
			if r.GetTypeUrl() != types[i] || r.GetResponseNonce() != "" || r.GetErrorDetail() != nil {
				p.t.Fatalf("first request %d of a stream: %v", i, r)
			}
			first[i] = r
		}
		return st, first
	}
	panic("streams is never closed")
}

// answer sends a response and returns the client's reply to it.
func (st *stream) answer(r *discoveryv3.DeltaDiscoveryResponse) *discoveryv3.DeltaDiscoveryRequest {
	st.t.Helper()
	if err := st.s.Send(r); err != nil {
		st.t.Fatal(err)
	}
	reply, err := st.s.Recv()
	if err != nil {
		st.t.Fatalf("no reply to a response: %v", err)
	}
	if reply.GetTypeUrl() != r.GetTypeUrl() || reply.GetResponseNonce() != r.GetNonce() {
		st.t.Fatalf("reply to %s/%s is for %s/%s", r.GetTypeUrl(), r.GetNonce(), reply.GetTypeUrl(), reply.GetResponseNonce())
	}
	return reply
}

func resource(name, version string, body []byte) *discoveryv3.Resource {
	return &discoveryv3.Resource{Name: name, Version: version, Resource: &anypb.Any{Value: body}}
}

// rawCodec sends []byte as they are: what no encoder would make.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) {
	switch v := v.(type) {
	case []byte:
		return v, nil
	case proto.Message:
		return proto.Marshal(v)
	}
	return nil, fmt.Errorf("cannot encode a %T", v)
}

func (rawCodec) Unmarshal(b []byte, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return errors.New("not a message")
	}
	return proto.Unmarshal(b, m)
}

// planeCertificate is istiod.test's, and the PEM of its root. It is valid in
// the year 2000, where a bubble begins.
var planeCertificate = sync.OnceValues(func() (tls.Certificate, string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"istiod.test"},
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2199, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
})
