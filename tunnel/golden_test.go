package tunnel_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/hbone/hbonetest"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/workloadapi"
)

// These transcripts hold what a stock ztunnel was recorded to send
// (golden/hbone.txt) against what we send in its place. Differences that are
// meant: the stream window starts where the configuration says, here at
// ztunnel's 4 MiB; refusals carry a proxy-status; a reset stays a reset.

// A foreign peer speaks through x/net's Framer over crypto/tls.
type foreign struct {
	t    testing.TB
	conn *tls.Conn
	fr   *http2.Framer
	enc  *hpack.Encoder
	head bytes.Buffer

	mu  sync.Mutex
	log []string // what it received, in the form of golden/hbone.txt
}

func newForeign(t testing.TB, conn *tls.Conn) *foreign {
	f := &foreign{t: t, conn: conn, fr: http2.NewFramer(conn, conn)}
	f.enc = hpack.NewEncoder(&f.head)
	f.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.fr.SetMaxReadFrameSize(1 << 20)
	return f
}

// read collects frames until the connection ends.
func (f *foreign) read() {
	for {
		fr, err := f.fr.ReadFrame()
		line := "closed"
		if err == nil {
			line = describe(fr)
		}
		f.mu.Lock()
		f.log = append(f.log, line)
		f.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func describe(fr http2.Frame) string {
	id := fr.Header().StreamID
	switch fr := fr.(type) {
	case *http2.SettingsFrame:
		if fr.IsAck() {
			return "SETTINGS ACK"
		}
		s := "SETTINGS"
		_ = fr.ForeachSetting(func(v http2.Setting) error { s += fmt.Sprintf(" [%v=%d]", v.ID, v.Val); return nil })
		return s
	case *http2.WindowUpdateFrame:
		return fmt.Sprintf("WINDOW_UPDATE stream=%d +%d", id, fr.Increment)
	case *http2.MetaHeadersFrame:
		s := fmt.Sprintf("HEADERS stream=%d", id)
		if fr.StreamEnded() {
			s += " END_STREAM"
		}
		for _, h := range fr.Fields {
			s += fmt.Sprintf("\n%s: %q", h.Name, h.Value)
		}
		return s
	case *http2.DataFrame:
		if fr.StreamEnded() {
			return fmt.Sprintf("DATA stream=%d len=%d END_STREAM", id, len(fr.Data()))
		}
		return fmt.Sprintf("DATA stream=%d len=%d %q", id, len(fr.Data()), fr.Data())
	case *http2.RSTStreamFrame:
		return fmt.Sprintf("RST_STREAM stream=%d %v", id, fr.ErrCode)
	case *http2.PingFrame:
		if fr.IsAck() {
			return "PING ACK"
		}
		return fmt.Sprintf("PING %x", fr.Data)
	case *http2.GoAwayFrame:
		return fmt.Sprintf("GOAWAY %v last=%d", fr.ErrCode, fr.LastStreamID)
	}
	return fr.Header().Type.String()
}

func (f *foreign) headers(id uint32, end bool, pairs ...string) {
	f.head.Reset()
	for i := 0; i < len(pairs); i += 2 {
		_ = f.enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	if err := f.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: f.head.Bytes(), EndHeaders: true, EndStream: end}); err != nil {
		f.t.Error(err)
	}
}

// want compares what came so far, one regular expression a frame, in order.
func (f *foreign) want(lines ...string) {
	f.t.Helper()
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, want := range lines {
		if i >= len(f.log) {
			f.t.Fatalf("frame %d is missing, want %s\ngot\n%s", i, want, strings.Join(f.log, "\n"))
		}
		if !regexp.MustCompile("^(?s:" + want + ")$").MatchString(f.log[i]) {
			f.t.Errorf("frame %d is\n%s\nwant\n%s", i, f.log[i], want)
		}
	}
	f.log = f.log[len(lines):]
	if len(f.log) > 0 {
		f.t.Errorf("more frames:\n%s", strings.Join(f.log, "\n"))
	}
}

func recordedWorkload(p *pod, kind workloadapi.WorkloadType, name, version string) {
	w := p.workload
	w.WorkloadType, w.WorkloadName, w.CanonicalName, w.CanonicalRevision = kind, name, name, version
	w.Locality = &workloadapi.Locality{Region: "r1", Zone: "z1"}
	p.w.put(w)
	synctest.Wait()
}

func TestTranscriptAsClient(t *testing.T) {
	inWorld(t, func(w *world) {
		w.edit = func(c *tunnel.Config) { c.H2Client = h2.Config{InitialWindow: 4 << 20} }
		a := w.pod("a", "10.0.0.1")
		recordedWorkload(a, workloadapi.WorkloadType_DEPLOYMENT, "client", "v1")
		w.put(workload("b", "10.0.0.2"))
		synctest.Wait()
		var hello *tls.ClientHelloInfo
		cfg := w.ca.Issue(identity.MustParse("spiffe://cluster.local/ns/default/sa/b")).ServerTLS().Clone()
		cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { hello = h; return nil, nil }
		peers := make(chan *foreign, 1)
		w.raw = map[netip.AddrPort]func(splice.End){netip.MustParseAddrPort("10.0.0.2:15008"): func(end splice.End) {
			conn := hbonetest.New(a.loop, end)
			go func() {
				c := tls.Server(conn, cfg)
				preface := make([]byte, len(http2.ClientPreface))
				if _, err := c.Read(preface); err != nil || string(preface) != http2.ClientPreface {
					w.t.Errorf("preface %q, %v", preface, err)
				}
				f := newForeign(w.t, c)
				peers <- f
				f.read()
			}()
		}}
		app := a.call("10.0.0.2:8080")
		f := <-peers
		if hello.ServerName != "" || fmt.Sprint(hello.SupportedProtos) != "[h2]" || fmt.Sprint(hello.SupportedVersions) != fmt.Sprint([]uint16{tls.VersionTLS13}) {
			t.Errorf("ClientHello: sni %q, alpn %v, versions %v", hello.ServerName, hello.SupportedProtos, hello.SupportedVersions)
		}
		f.want(
			`SETTINGS \[ENABLE_PUSH=0\] \[INITIAL_WINDOW_SIZE=4194304\] \[MAX_FRAME_SIZE=1048576\] \[MAX_HEADER_LIST_SIZE=16384\]`,
			`WINDOW_UPDATE stream=0 \+16711681`,
			`HEADERS stream=1
:method: "CONNECT"
:authority: "10\.0\.0\.2:8080"
baggage: "k8s\.cluster\.name=Kubernetes,k8s\.namespace\.name=default,k8s\.deployment\.name=client,service\.name=client,service\.version=v1,cloud\.region=r1,cloud\.availability_zone=z1"
forwarded: "for=\\"10\.0\.0\.1:40000\\""
traceparent: "00-[0-9a-f]{32}-[0-9a-f]{16}-00"`)
		app.want("", "pending") // no SYN-ACK before the 200
		_ = f.fr.WriteSettings()
		_ = f.fr.WriteSettingsAck()
		f.want(`SETTINGS ACK`)
		f.headers(1, false, ":status", "200", "baggage", "service.name=server")
		synctest.Wait()
		app.send("abc")
		app.closeWrite()
		f.want(`DATA stream=1 len=3 "abc"`, `DATA stream=1 len=0 END_STREAM`)
		_ = f.fr.WriteData(1, false, []byte("xyz"))
		_ = f.fr.WriteData(1, true, nil)
		synctest.Wait()
		app.want("xyz", "eof")
		a.last(tunnel.OK)
		f.mu.Lock()
		f.log = nil // WINDOW_UPDATEs, or none
		f.mu.Unlock()
		time.Sleep(10 * time.Second)
		f.want(`PING [0-9a-f]{16}`) // after 10 s of silence
		a.Close()
		_ = f.conn.Close()
	})
}

func TestTranscriptAsServer(t *testing.T) {
	inWorld(t, func(w *world) {
		w.edit = func(c *tunnel.Config) { c.H2Server = h2.Config{InitialWindow: 4 << 20} }
		b := w.pod("b", "10.0.0.2")
		recordedWorkload(b, workloadapi.WorkloadType_DEPLOYMENT, "server", "v2")
		w.put(deny("deny-9999", 9999))
		w.put(service())
		b.join(service())
		apps := catch(b, 8080)
		w.put(workload("a", "10.0.0.1"))
		synctest.Wait()

		conn, end := hbonetest.Pipe(b.loop, 64<<10)
		b.loop.Do(func() {
			b.HandleTunnel(end, netip.MustParseAddrPort("10.0.0.1:42494"), netip.MustParseAddrPort("10.0.0.2:15008"))
		})
		cert := w.ca.Issue(identity.MustParse("spiffe://cluster.local/ns/default/sa/a"))
		c := tls.Client(conn, cert.ClientTLS([]identity.ID{identity.MustParse("spiffe://cluster.local/ns/default/sa/b")}))
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		if s := c.ConnectionState(); s.Version != tls.VersionTLS13 || s.NegotiatedProtocol != "h2" || len(s.PeerCertificates) != 1 {
			t.Errorf("tls %x, alpn %q, chain of %d", s.Version, s.NegotiatedProtocol, len(s.PeerCertificates))
		}
		f := newForeign(t, c)
		_, _ = c.Write([]byte(http2.ClientPreface))
		_ = f.fr.WriteSettings()
		go f.read()
		f.want(
			`SETTINGS \[MAX_CONCURRENT_STREAMS=200\] \[INITIAL_WINDOW_SIZE=4194304\] \[MAX_FRAME_SIZE=1048576\] \[MAX_HEADER_LIST_SIZE=65536\]`,
			`WINDOW_UPDATE stream=0 \+16711681`,
			`SETTINGS ACK`)
		_ = f.fr.WriteSettingsAck()

		refused := func(id uint32, authority, status, why string) {
			t.Helper()
			f.headers(id, false, ":method", "CONNECT", ":authority", authority)
			f.want(
				fmt.Sprintf("HEADERS stream=%d END_STREAM\n:status: %q\nproxy-status: %q", id, status, "ztun; error="+why),
				fmt.Sprintf("RST_STREAM stream=%d NO_ERROR", id))
		}
		refused(1, "nonsense", "400", "http_request_error")
		refused(3, "10.0.0.3:80", "400", "destination_ip_prohibited")
		refused(5, "10.0.0.2:9999", "401", "http_request_denied")
		refused(7, "10.0.0.2:15008", "503", "destination_ip_prohibited")
		refused(9, "10.0.0.2:7777", "503", "connection_refused")
		refused(11, "unknown.example:80", "503", "destination_not_found")
		refused(13, "server.default.svc.cluster.local:81", "503", "destination_unavailable")

		const baggage = `
baggage: "k8s\.cluster\.name=Kubernetes,k8s\.namespace\.name=default,k8s\.deployment\.name=server,service\.name=server,service\.version=v2,cloud\.region=r1,cloud\.availability_zone=z1"`
		f.headers(15, false, ":method", "CONNECT", ":authority", "server.default.svc.cluster.local:80")
		f.want("HEADERS stream=15\n:status: \"200\"" + baggage)
		f.headers(17, false, ":method", "CONNECT", ":authority", "[::ffff:10.0.0.2]:8080",
			"x-forwarded-network", "elsewhere", "baggage", "k8s.namespace.name=far,k8s.pod.name=a")
		f.want("HEADERS stream=17\n:status: \"200\"" + baggage)

		_ = f.fr.WriteData(15, false, []byte("abc"))
		_ = f.fr.WriteData(15, true, nil)
		synctest.Wait()
		(*apps)[0].want("abc", "eof")
		if got := (*apps)[0].from.Addr().String(); got != "10.0.0.1" {
			t.Errorf("the app saw %s", got)
		}
		(*apps)[0].send("answer")
		(*apps)[0].closeWrite()
		f.want(`DATA stream=15 len=6 "answer"`, `DATA stream=15 len=0 END_STREAM`)
		(*apps)[1].reset()
		f.want(`RST_STREAM stream=17 CONNECT_ERROR`)
		want := hbone.Baggage{Namespace: "far", WorkloadType: "pod", Workload: "a"}
		if r := b.last(tunnel.ServerReset); r.SrcWorkload != nil || r.SrcBaggage == nil || *r.SrcBaggage != want {
			t.Errorf("a client of another network: workload %v, baggage %+v, want %+v", r.SrcWorkload, r.SrcBaggage, want)
		}

		f.headers(19, true, ":method", "GET", ":scheme", "https", ":path", "/", ":authority", "10.0.0.2:8080")
		f.want("HEADERS stream=19 END_STREAM\n:status: \"400\".*")

		time.Sleep(10 * time.Second)
		f.want(`PING [0-9a-f]{16}`)
		time.Sleep(20 * time.Second) // no answer
		f.want(`GOAWAY NO_ERROR last=19`, `closed`)
		_ = c.Close()
	})
}
