package admin

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ztun/ztun/cmd/internal/telemetry"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/mesh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func do(h http.Handler, method, target string, header ...string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(method, target, nil)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	h.ServeHTTP(w, r)
	return w
}

func TestReadiness(t *testing.T) {
	var r Readiness
	check := func(why string, status int, body string) {
		t.Helper()
		w := do(r.Handler(), "GET", "/healthz/ready")
		if w.Code != status || w.Body.String() != body {
			t.Errorf("%s: %d %q, want %d %q", why, w.Code, w.Body.String(), status, body)
		}
	}
	check("no tasks", 200, "ready\n")
	r.Set("workload proxy manager", false)
	r.Set("state manager", false)
	check("two tasks", 500, "not ready, pending: state manager, workload proxy manager")
	r.Set("state manager", true)
	check("one task", 500, "not ready, pending: workload proxy manager")
	r.Set("workload proxy manager", true)
	check("none left", 200, "ready\n")
	r.Set("workload proxy manager", false) // The agent went away.
	check("again", 500, "not ready, pending: workload proxy manager")

	if w := do(r.Handler(), "POST", "/healthz/ready"); w.Code != 405 {
		t.Errorf("POST = %d, want 405", w.Code)
	}
	if w := do(r.Handler(), "GET", "/"); w.Code != 404 {
		t.Errorf("another path = %d, want 404", w.Code)
	}
}

func testAdmin(t *testing.T) (h http.Handler, quits *int) {
	t.Helper()
	logs, err := telemetry.NewLogs(io.Discard, telemetry.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	quits = new(int)
	return Handler(Config{
		Logs: logs,
		Quit: func() { *quits++ },
		Dump: func(context.Context) (any, error) { return map[string]string{"a": "<b>"}, nil },
	}), quits
}

func TestLogging(t *testing.T) {
	h, _ := testAdmin(t)
	for _, tt := range []struct {
		method, target string
		status         int
		want           string
	}{
		{"GET", "/logging", 405, "usage: "},
		{"POST", "/logging", 200, "current log level is info\n"},
		{"POST", "/logging?level=debug", 200, "current log level is debug\n"},
		{"POST", "/logging?level=xds=trace,access=off", 200, "current log level is debug,xds=trace,access=off\n"},
		{"POST", "/logging?level=xds:warn", 200, "current log level is debug,access=off,xds=warn\n"},
		{"POST", "/logging?level=loud", 400, "Invalid level"},
		{"POST", "/logging?level=", 400, "Invalid level"},
		{"POST", "/logging", 200, "current log level is debug,access=off,xds=warn\n"},
		{"POST", "/logging?reset&level=warn", 200, "current log level is warn\n"},
		{"POST", "/logging?reset", 200, "current log level is info\n"},
	} {
		w := do(h, tt.method, tt.target)
		if w.Code != tt.status || !strings.HasPrefix(w.Body.String(), tt.want) {
			t.Errorf("%s %s = %d %q, want %d %q", tt.method, tt.target, w.Code, w.Body.String(), tt.status, tt.want)
		}
	}
}

func TestQuit(t *testing.T) {
	h, quits := testAdmin(t)
	if w := do(h, "GET", "/quitquitquit"); w.Code != 405 || *quits != 0 {
		t.Errorf("GET = %d, %d quits", w.Code, *quits)
	}
	if w := do(h, "POST", "/quitquitquit", "Origin", "http://evil.example"); w.Code != 403 || *quits != 0 {
		t.Errorf("from a web page = %d, %d quits", w.Code, *quits)
	}
	if w := do(h, "POST", "/quitquitquit"); w.Code != 200 || w.Body.String() != "shutdown now\n" || *quits != 1 {
		t.Errorf("POST = %d %q, %d quits", w.Code, w.Body.String(), *quits)
	}
}

func TestAdminPages(t *testing.T) {
	h, _ := testAdmin(t)
	if w := do(h, "GET", "/"); w.Code != 200 || !strings.Contains(w.Body.String(), "config_dump") ||
		!strings.HasPrefix(w.Header().Get("Content-Type"), "text/html") {
		t.Errorf("/ = %d %q", w.Code, w.Body.String())
	}
	w := do(h, "POST", "/config_dump")
	if w.Code != 200 || w.Body.String() != "{\n  \"a\": \"<b>\"\n}" || w.Header().Get("Content-Type") != "application/json" {
		t.Errorf("/config_dump = %d %q", w.Code, w.Body.String())
	}
	for target, status := range map[string]int{
		"/nothing": 404, "/debug/pprof/heap": 200, "/debug/pprof/goroutine?debug=1": 200, "/debug/pprof/nothing": 404,
		"/debug/pprof/profile?seconds=0": 400, "/debug/pprof/profile?seconds=301": 400,
		"/debug/pprof/profile?seconds=x": 400, "/debug/pprof/profile?frequency=1001": 400,
	} {
		if w := do(h, "GET", target); w.Code != status {
			t.Errorf("%s = %d, want %d", target, w.Code, status)
		}
	}
	failing := Handler(Config{Dump: func(context.Context) (any, error) { return nil, errors.New("no dump") }})
	if w := do(failing, "GET", "/config_dump"); w.Code != 500 || !strings.Contains(w.Body.String(), "no dump") {
		t.Errorf("a dump that fails = %d %q", w.Code, w.Body.String())
	}
}

func TestMetrics(t *testing.T) {
	h := Metrics(telemetry.NewMetrics(""))
	for _, path := range []string{"/metrics", "/stats/prometheus"} {
		w := do(h, "POST", path)
		if w.Code != 200 || !strings.Contains(w.Body.String(), `istio_build{component="ztunnel",tag="unknown"} 1`) ||
			!strings.HasSuffix(w.Body.String(), "# EOF\n") || w.Header().Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("%s = %d, %q", path, w.Code, w.Header())
		}
	}
	if w := do(h, "GET", "/other"); w.Code != 404 {
		t.Errorf("/other = %d, want 404", w.Code)
	}
	w := do(h, "GET", "/metrics", "Accept", "application/openmetrics-text;version=1.0.0", "Accept-Encoding", "deflate, gzip;q=0.5")
	if got := w.Header().Get("Content-Type"); got != "application/openmetrics-text;charset=utf-8;version=1.0.0" {
		t.Errorf("content type = %q", got)
	}
	z, err := gzip.NewReader(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(z); err != nil || !strings.HasSuffix(string(text), "# EOF\n") {
		t.Errorf("gzip: %d bytes, %v", len(text), err)
	}
	for header, want := range map[string]bool{"": false, "gzip": true, "GZIP": true, "gzip;q=0": false, "gzip;q=0.0": false,
		"gzip; q=0.1": true, "br, *": true, "identity": false} {
		if got := acceptsGzip(header); got != want {
			t.Errorf("acceptsGzip(%q) = %v", header, got)
		}
	}
}

func TestServe(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.DiscardHandler)
	var r Readiness
	wait, err := Serve(ctx, "readiness", []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}, r.Handler(), log)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	wait()

	taken := httptest.NewServer(r.Handler())
	defer taken.Close()
	addr := netip.MustParseAddrPort(taken.Listener.Addr().String())
	if _, err := Serve(context.Background(), "readiness", []netip.AddrPort{addr}, r.Handler(), log); err == nil {
		t.Error("an address that is taken was accepted")
	}
}

// shape is the JSON value's keys, down to depth objects, with lists as their
// first element.
func shape(v any, depth int) any {
	switch x := v.(type) {
	case map[string]any:
		if depth == 0 {
			return "object"
		}
		out := map[string]any{}
		for k, e := range x {
			out[k] = shape(e, depth-1)
		}
		return out
	case []any:
		if len(x) == 0 {
			return "list"
		}
		return []any{shape(x[0], depth)}
	case string:
		return "string"
	case nil:
		return "null"
	}
	return "value"
}

func TestDumpGolden(t *testing.T) {
	text, err := os.ReadFile("testdata/config_dump.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden map[string]any
	if err := json.Unmarshal(text, &golden); err != nil {
		t.Fatal(err)
	}
	// The certificates of the golden dump, from its own PEM.
	var status []certs.Status
	for _, c := range golden["certificates"].([]any) {
		c := c.(map[string]any)
		s := certs.Status{ID: identity.MustParse(c["identity"].(string)), State: c["state"].(string), Cert: &certs.Certificate{}}
		s.Cert.Chain = append(s.Cert.Chain, parse(t, c["certChain"]))
		s.Cert.Roots = append(s.Cert.Roots, parse(t, c["rootCerts"]))
		status = append(status, s)
	}
	src, dst := netip.MustParseAddrPort("10.0.0.1:34540"), netip.MustParseAddrPort("10.0.0.2:15008")
	out := tunnel.Record{Src: src, Dst: dst, HBONEAddr: "10.0.0.2:8080", Start: time.Unix(1, 0)}
	in := out
	in.Direction, in.Src = tunnel.Inbound, netip.MustParseAddrPort("10.0.0.1:45560")
	info := func(name string) WorkloadInfo {
		return WorkloadInfo{Name: name, Namespace: "default", ServiceAccount: name}
	}
	pods := map[string]WorkloadState{
		"uid-pa": {State: "Up", Info: info("pa"), Connections: DumpConnections([]tunnel.Live{{Record: out}})},
		"uid-pb": {State: "Up", Info: info("pb"), Connections: DumpConnections([]tunnel.Live{{Record: in}})},
	}
	joined := out
	joined.SameNode = true
	if c := DumpConnections([]tunnel.Live{{Record: out}, {Record: joined}}).Outbound; c[0].Path != "" || c[1].Path != "same-node" || c[1].Protocol != "HBONE" {
		t.Errorf("connections on the wire and in memory: %+v", c)
	}
	m := mesh.NewStore(mesh.Config{}).Snapshot().Dump()
	ours, err := json.Marshal(NewDump(map[string]any{}, map[string]any{}, m, status, pods))
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(ours, &got); err != nil {
		t.Fatal(err)
	}
	for key := range golden {
		if _, ok := got[key]; !ok {
			t.Errorf("the dump lacks %q", key)
		}
	}
	if g, w := jsonOf(t, got["workloadState"]), jsonOf(t, golden["workloadState"]); g != w {
		t.Errorf("workloadState\n got %s\nwant %s", g, w)
	}
	if g, w := jsonOf(t, shape(got["certificates"], 9)), jsonOf(t, shape(golden["certificates"], 9)); g != w {
		t.Errorf("certificates have the shape\n%s\nwant\n%s", g, w)
	}
	for i, c := range got["certificates"].([]any) {
		for _, list := range []string{"certChain", "rootCerts"} {
			g := c.(map[string]any)[list].([]any)[0].(map[string]any)
			w := golden["certificates"].([]any)[i].(map[string]any)[list].([]any)[0].(map[string]any)
			for _, key := range []string{"serialNumber", "validFrom", "expirationTime"} {
				if g[key] != w[key] {
					t.Errorf("%s %s = %v, want %v", list, key, g[key], w[key])
				}
			}
		}
	}
}

func jsonOf(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestDumpPlaintextConnections(t *testing.T) {
	rec := tunnel.Record{Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:2")}
	in := rec
	in.Direction = tunnel.Inbound
	got := jsonOf(t, DumpConnections([]tunnel.Live{{Record: rec}, {Record: in}}))
	const want = `{"inbound":[{"actualDst":"10.0.0.2:2","originalDst":null,"protocol":"TCP","src":"10.0.0.1:1"}],` +
		`"outbound":[{"actualDst":"10.0.0.2:2","originalDst":"10.0.0.2:2","protocol":"TCP","src":"10.0.0.1:1"}]}`
	if got != want {
		t.Errorf(" got %s\nwant %s", got, want)
	}
	if got := jsonOf(t, certificateDump(certs.Status{State: "Initializing"})); !strings.Contains(got, `"certChain":[]`) {
		t.Errorf("without a certificate: %s", got)
	}
}
