package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"math/big"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestFalseIstiod(t *testing.T) {
	ctx := claim(t, "an istiod with a stranger's certificate, and a certified one that answers garbage: the proxies name what is wrong, traffic goes on, and the true one is taken up again")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.until("a way to the server", works, "client", "get", "http://server/")
	slice, err := world.DiscoveryV1().EndpointSlices(system).Get(ctx, "istiod-host", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort(slice.Endpoints[0].Addresses[0], "15012")
	authority, err := meshAuthority(ctx)
	if err != nil {
		t.Fatal(err)
	}
	world.StopIstiod()
	up := false
	start := func() {
		if err := world.StartIstiod(context.Background()); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() {
		if !up {
			start()
		}
	})
	running := p.traffic("client", "server", 10*time.Second)
	stranger := serveFalse(t, address, selfSigned(t, nil))
	for _, n := range world.Nodes {
		p.said(proxies, n.Name, "istiod.istio-system.svc:15012", "unknown authority")
	}
	stranger.Stop()
	garbage := serveFalse(t, address, selfSigned(t, authority))
	for _, n := range world.Nodes {
		p.said(proxies, n.Name, "resources rejected", "Kubernetes//Pod/e2e/none: mesh: decode address")
		p.said(proxies, n.Name, "stream to istiod.istio-system.svc:15012", "unmarshal")
	}
	garbage.Stop()
	running.whole(t)
	start()
	up = true
	p.run(pod{name: "later", node: "node2"})
	p.enrolled("later")
	p.until("a pod that came after", works, "client", "get", "-timeout=2s", "http://later/")
}

// meshAuthority is the certificate and key that istiod signs with.
func meshAuthority(ctx context.Context) (*tls.Certificate, error) {
	s, err := world.CoreV1().Secrets(system).Get(ctx, "istio-ca-secret", metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	c, err := tls.X509KeyPair(s.Data["ca-cert.pem"], s.Data["ca-key.pem"])
	return &c, err
}

// selfSigned is a certificate for istiod, signed by an authority or, without one, by itself.
func selfSigned(t *testing.T, authority *tls.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"istiod.istio-system.svc"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	parent, signer := template, any(key)
	if authority != nil {
		parent, signer = authority.Leaf, authority.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// serveFalse answers every stream with garbage: a message whose content is none, and once that is refused what is no message.
func serveFalse(t *testing.T, address string, certificate tls.Certificate) *grpc.Server {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&certificate)), grpc.ForceServerCodec(asItIs{}),
		grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			if err := stream.SendMsg(garbageResponse); err != nil {
				return err
			}
			for {
				var said []byte
				if err := stream.RecvMsg(&said); err != nil {
					return err
				}
				if bytes.Contains(said, []byte(nonce)) {
					return stream.SendMsg([]byte("\xff\xff\xff\xff"))
				}
			}
		}))
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return s
}

// garbageResponse is a DeltaDiscoveryResponse of one Address that is none.
var garbageResponse = func() []byte {
	const kind = "type.googleapis.com/istio.workload.Address"
	content := append(field(1, kind), field(2, "\xff\xff\xff\xff")...)
	resource := append(field(3, "Kubernetes//Pod/e2e/none"), field(2, string(content))...)
	return append(append(field(2, string(resource)), field(4, kind)...), field(5, nonce)...)
}()

const nonce = "nonce of garbage"

// field is one of protobuf, with a length.
func field(number uint64, content string) []byte {
	b := binary.AppendUvarint(nil, number<<3|2)
	return append(binary.AppendUvarint(b, uint64(len(content))), content...)
}

// asItIs is the codec of messages that are bytes already.
type asItIs struct{}

func (asItIs) Name() string { return "proto" }

func (asItIs) Marshal(v any) ([]byte, error) {
	b, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("%T is not bytes", v)
	}
	return b, nil
}

func (asItIs) Unmarshal(b []byte, v any) error {
	to, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("%T is no place for bytes", v)
	}
	*to = bytes.Clone(b)
	return nil
}
