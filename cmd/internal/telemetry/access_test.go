package telemetry

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/mesh"
)

// keysInOrder are the keys of one JSON object as they stand in it.
func keysInOrder(t *testing.T, text string) []string {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	var keys []string
	for depth, key := 0, true; ; {
		tok, err := dec.Token()
		if err != nil {
			return keys
		}
		switch tok {
		case json.Delim('{'):
			depth++
		case json.Delim('}'):
			depth--
		default:
			if key && depth == 1 {
				keys = append(keys, tok.(string))
			}
			key = !key
		}
	}
}

// recordOf turns a golden line back into what the connection must have been.
func recordOf(t *testing.T, f map[string]string) *tunnel.Record {
	t.Helper()
	workload := func(side string) (*mesh.Workload, identity.ID) {
		w := &mesh.Workload{Name: f[side+".workload"], Namespace: f[side+".namespace"]}
		w.Cluster = f[side+".cluster"]
		return w, identity.MustParse(f[side+".identity"])
	}
	number := func(key string) uint64 {
		n, err := strconv.ParseUint(f[key], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	r := &tunnel.Record{
		Src: netip.MustParseAddrPort(f["src.addr"]), Dst: netip.MustParseAddrPort(f["dst.addr"]),
		HBONEAddr: f["dst.hbone_addr"],
		Sent:      number("bytes_sent"), Received: number("bytes_recv"),
	}
	r.SrcWorkload, r.SrcIdentity = workload("src")
	r.DstWorkload, r.DstIdentity = workload("dst")
	if f["direction"] == "inbound" {
		r.Direction = tunnel.Inbound
	}
	if host := f["dst.service"]; host != "" {
		r.Service = &mesh.Service{ServiceKey: mesh.ServiceKey{Hostname: host}}
	}
	var err error
	if r.Duration, err = time.ParseDuration(f["duration"]); err != nil {
		t.Fatal(err)
	}
	if f["error"] != "" {
		// Its own text is the reason's; the golden text stands for both.
		r.Reason, r.Err = tunnel.PeerStatus, errors.New(f["error"])
	}
	return r
}

func logRecord(t *testing.T, asJSON bool, at time.Time, r *tunnel.Record) string {
	t.Helper()
	var out bytes.Buffer
	logs, err := NewLogs(&out, LogOptions{JSON: asJSON, Now: func() time.Time { return at }})
	if err != nil {
		t.Fatal(err)
	}
	rec := NewTraffic(logs).Recorder()
	rec.Opened(r)
	rec.Closed(r)
	return out.String()
}

// TestAccessJSON writes the connections of a stock ztunnel's log again.
func TestAccessJSON(t *testing.T) {
	golden, err := os.ReadFile("testdata/access.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range strings.Split(strings.TrimSpace(string(golden)), "\n") {
		fields := map[string]string{}
		var any map[string]any
		if err := json.Unmarshal([]byte(want), &any); err != nil {
			t.Fatal(err)
		}
		for k, v := range any {
			if n, ok := v.(float64); ok {
				v = strconv.FormatFloat(n, 'f', -1, 64)
			}
			fields[k] = v.(string)
		}
		at, err := time.Parse(time.RFC3339Nano, fields["time"])
		if err != nil {
			t.Fatal(err)
		}
		got := strings.TrimSuffix(logRecord(t, true, at, recordOf(t, fields)), "\n")
		if got != want {
			t.Errorf("keys %q\n got %s\nwant %s", keysInOrder(t, got), got, want)
		}
	}
}

// TestAccessSaysThePath: where a stock ztunnel's log has nothing, behind all it has.
func TestAccessSaysThePath(t *testing.T) {
	r := &tunnel.Record{
		Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:15008"), HBONEAddr: "10.0.0.2:80",
		Reason: tunnel.PeerStatus, Err: errors.New("x"),
	}
	const path = ` path="same-node"`
	if line := logRecord(t, false, time.Time{}, r); strings.Contains(line, path) {
		t.Errorf("on the wire: %s", line)
	}
	r.SameNode = true
	if line := logRecord(t, false, time.Time{}, r); !strings.HasSuffix(line, path+"\n") {
		t.Errorf("in memory: %s", line)
	}
}

// TestAccessPlain does it in the plain form. That run had an empty trust
// domain, which is no identity here: it is given one.
func TestAccessPlain(t *testing.T) {
	golden, err := os.ReadFile("testdata/access.plain.txt")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(strings.TrimSpace(string(golden)), "spiffe:///", "spiffe://td/")
	for _, want := range strings.Split(text, "\n") {
		parts := strings.SplitN(want, "\t", 5)
		fields := map[string]string{}
		rest := parts[4]
		for rest != "" {
			var key, value string
			key, rest, _ = strings.Cut(rest, "=")
			if quoted, err := strconv.QuotedPrefix(rest); err == nil {
				rest = strings.TrimPrefix(rest[len(quoted):], " ")
				value, _ = strconv.Unquote(quoted)
			} else {
				value, rest, _ = strings.Cut(rest, " ")
			}
			fields[key] = value
		}
		at, err := time.Parse(time.RFC3339Nano, parts[0])
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSuffix(logRecord(t, false, at, recordOf(t, fields)), "\n"); got != want {
			t.Errorf(" got %s\nwant %s", got, want)
		}
	}
}

func TestAccessLevels(t *testing.T) {
	r := &tunnel.Record{Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:2")}
	at := time.Date(2026, 11, 21, 11, 16, 6, 304659999, time.UTC)
	var out bytes.Buffer
	logs, err := NewLogs(&out, LogOptions{Filter: "info,access=debug", Now: func() time.Time { return at }})
	if err != nil {
		t.Fatal(err)
	}
	rec := NewTraffic(logs).Recorder()
	rec.Opened(r)
	rec.Closed(r)
	r.Reason, r.Err = tunnel.UnknownWorkload, nil
	rec.Failed(r)
	const want = "2026-11-21T11:16:06.304659Z\tdebug\taccess\tconnection opened\t" +
		`src.addr=10.0.0.1:1 dst.addr=10.0.0.2:2 direction="outbound"` + "\n" +
		"2026-11-21T11:16:06.304659Z\tinfo\taccess\tconnection complete\t" +
		`src.addr=10.0.0.1:1 dst.addr=10.0.0.2:2 direction="outbound" bytes_sent=0 bytes_recv=0 duration="0ms"` + "\n" +
		"2026-11-21T11:16:06.304659Z\twarn\taccess\tconnection failed\t" +
		`src.addr=10.0.0.1:1 dst.addr=10.0.0.2:2 direction="outbound" error="local workload is not known"` + "\n"
	if out.String() != want {
		t.Errorf(" got %q\nwant %q", out.String(), want)
	}
	out.Reset()
	if err := logs.Change("access=off", false); err != nil {
		t.Fatal(err)
	}
	rec.Opened(r)
	rec.Closed(r)
	rec.Failed(r)
	if out.Len() > 0 {
		t.Errorf("logged although off: %s", out.String())
	}
}

func BenchmarkRecorder(b *testing.B) {
	logs, err := NewLogs(discard{}, LogOptions{JSON: true})
	if err != nil {
		b.Fatal(err)
	}
	rec := NewTraffic(logs).Recorder()
	r := &tunnel.Record{
		Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:15008"), HBONEAddr: "10.0.0.2:80",
		SrcWorkload: &mesh.Workload{Name: "pa", Namespace: "default"}, DstWorkload: &mesh.Workload{Name: "pb", Namespace: "default"},
		SrcIdentity: identity.MustParse("spiffe://td/ns/default/sa/pa"), DstIdentity: identity.MustParse("spiffe://td/ns/default/sa/pb"),
	}
	b.ReportAllocs()
	for b.Loop() {
		rec.Opened(r)
		rec.Closed(r)
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
