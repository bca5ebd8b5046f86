package zds

import (
	"bytes"
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/cmd/internal/zds/zdsapi"
)

func workload(uid string) Workload {
	return Workload{UID: uid, Name: "pa", Namespace: "default", ServiceAccount: "sa"}
}

func fullWorkload(uid string) Workload {
	w := workload(uid)
	w.Device = &Device{
		ID:                "one",
		Addresses:         []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		MTU:               1400,
		BypassInbound:     true,
		DNSCapture:        true,
		VirtualInterfaces: true,
		OlderFlows: []Flow{
			{Local: netip.MustParseAddrPort("10.0.0.1:80"), Remote: netip.MustParseAddrPort("10.0.0.9:4711")},
			{Local: netip.MustParseAddrPort("[fd00::1]:80"), Remote: netip.MustParseAddrPort("[fd00::9]:4711")},
		},
		Offload:       true,
		NodeAddresses: []netip.Addr{netip.MustParseAddr("192.168.0.1")},
		ProbePorts:    []uint16{8080, 9090},
	}
	return w
}

// TestWire pins the bytes to Istio's field numbers.
func TestWire(t *testing.T) {
	for _, tt := range []struct {
		name string
		req  request
		want string
	}{
		{"add", request{kind: kindAdd, workload: Workload{UID: "u", Name: "n", Namespace: "s", ServiceAccount: "a"}},
			"0a0e0a0175" + "1209" + "0a016e" + "120173" + "1a0161"},
		{"del has its uid in field two", request{kind: kindDel, workload: Workload{UID: "u"}}, "1203120175"},
		{"snapshot sent", request{kind: kindSnapshotSent}, "1a00"},
		{"keep", request{kind: kindKeep, workload: Workload{UID: "u"}}, "2a030a0175"},
	} {
		got, err := encodeRequest(tt.req)
		if err != nil || hex.EncodeToString(got) != tt.want {
			t.Errorf("%s = %x, %v, want %s", tt.name, got, err, tt.want)
		}
	}
	if b, err := encodeHello(hello{}); err != nil || hex.EncodeToString(b) != "0801" {
		t.Errorf("hello = %x, %v", b, err)
	}
	if b, err := encodeResponse(response{}); err != nil || hex.EncodeToString(b) != "0a00" {
		t.Errorf("ack = %x, %v", b, err)
	}
	if b, err := encodeResponse(response{text: "no"}); err != nil || hex.EncodeToString(b) != "0a040a026e6f" {
		t.Errorf("nack = %x, %v", b, err)
	}
}

var helloOfOurs = hello{ztun: true, started: 1 << 40, leaving: true, part: portParts}

func TestRequestRoundTrip(t *testing.T) {
	for _, r := range []request{
		{kind: kindAdd, workload: workload("u")},
		{kind: kindAdd, workload: fullWorkload("u")},
		{kind: kindAdd, workload: fullWorkload("u"), icmp: MaxICMP},
		{kind: kindAdd, workload: fullWorkload("u"), predecessor: true, part: portParts},
		{kind: kindKeep, workload: Workload{UID: "u"}, lend: true},
		{kind: kindYield, workload: Workload{UID: "u"}},
		{kind: kindKeep, workload: Workload{UID: "u"}},
		{kind: kindDel, workload: Workload{UID: "u"}},
		{kind: kindSnapshotSent},
	} {
		b, err := encodeRequest(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeRequest(b)
		if err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("%v came back as %+v, %v", r, got, err)
		}
	}
}

// TestStockPeerSkipsDevice decodes as a peer does that knows only Istio's fields.
func TestStockPeerSkipsDevice(t *testing.T) {
	b, err := encodeRequest(request{kind: kindAdd, workload: fullWorkload("u")})
	if err != nil {
		t.Fatal(err)
	}
	var m zdsapi.WorkloadRequest
	if err := proto.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	m.GetAdd().Device = nil
	plain, err := proto.MarshalOptions{Deterministic: true}.Marshal(&m)
	if err != nil || len(plain) > 1024 {
		t.Errorf("without our field: %d bytes, %v", len(plain), err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	long := strings.Repeat("x", maxName+1)
	add := func(change func(*zdsapi.AddWorkload)) *zdsapi.WorkloadRequest {
		w := fullWorkload("u")
		a := &zdsapi.AddWorkload{Uid: "u", Device: w.Device.proto(),
			WorkloadInfo: &zdsapi.WorkloadInfo{Name: "n", Namespace: "s", ServiceAccount: "a"}}
		change(a)
		return &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Add{Add: a}}
	}
	for name, m := range map[string]*zdsapi.WorkloadRequest{
		"nothing":         {},
		"no info":         add(func(a *zdsapi.AddWorkload) { a.WorkloadInfo = nil }),
		"no uid":          add(func(a *zdsapi.AddWorkload) { a.Uid = "" }),
		"long uid":        add(func(a *zdsapi.AddWorkload) { a.Uid = long }),
		"newline in name": add(func(a *zdsapi.AddWorkload) { a.WorkloadInfo.Name = "a\nb" }),
		"no namespace":    add(func(a *zdsapi.AddWorkload) { a.WorkloadInfo.Namespace = "" }),
		"no address":      add(func(a *zdsapi.AddWorkload) { a.Device.Addresses = nil }),
		"address of 5":    add(func(a *zdsapi.AddWorkload) { a.Device.Addresses[0] = make([]byte, 5) }),
		"no MTU":          add(func(a *zdsapi.AddWorkload) { a.Device.Mtu = 0 }),
		"huge MTU":        add(func(a *zdsapi.AddWorkload) { a.Device.Mtu = 1 << 30 }),
		"3 ICMP sockets":  add(func(a *zdsapi.AddWorkload) { a.Device.IcmpSockets = MaxICMP + 1 }),
		"port 0":          add(func(a *zdsapi.AddWorkload) { a.Device.ProbePorts[0] = 0 }),
		"port 70000":      add(func(a *zdsapi.AddWorkload) { a.Device.ProbePorts[0] = 70000 }),
		"flow without an end": add(func(a *zdsapi.AddWorkload) {
			a.Device.OlderFlows[0].RemoteAddress = nil
		}),
		"too many flows": add(func(a *zdsapi.AddWorkload) {
			for range MaxOlderFlows {
				a.Device.OlderFlows = append(a.Device.OlderFlows, a.Device.OlderFlows[0])
			}
		}),
		"keep of nobody": {Payload: &zdsapi.WorkloadRequest_Keep{}},
		"del of nobody":  {Payload: &zdsapi.WorkloadRequest_Del{Del: &zdsapi.DelWorkload{}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := decodeRequest(b); err == nil {
			t.Errorf("%s: decoded as %+v, want an error", name, r)
		}
	}
	for _, b := range [][]byte{{0xff}, {0x08}, bytes.Repeat([]byte{0x0a}, 100)} {
		if _, err := decodeRequest(b); err == nil {
			t.Errorf("%x was decoded", b)
		}
		if _, err := decodeHello(b); err == nil {
			t.Errorf("%x was taken for a hello", b)
		}
	}
}

func TestLongestAddFits(t *testing.T) {
	w := fullWorkload(strings.Repeat("u", maxName))
	w.Device.OlderFlows = nil
	for i := range MaxOlderFlows {
		f := Flow{Local: netip.MustParseAddrPort("[fd00::1]:65535"),
			Remote: netip.AddrPortFrom(netip.MustParseAddr("fd00::2"), uint16(64512+i%1024))}
		w.Device.OlderFlows = append(w.Device.OlderFlows, f)
	}
	for i := range maxPorts {
		w.Device.ProbePorts = append(w.Device.ProbePorts[:min(i, len(w.Device.ProbePorts))], uint16(60000+i))
	}
	b, err := encodeRequest(request{kind: kindAdd, workload: w})
	if err != nil {
		t.Fatalf("%d bytes: %v", len(b), err)
	}
	if _, err := decodeRequest(b); err != nil {
		t.Error(err)
	}
	w.Device.OlderFlows = append(w.Device.OlderFlows, w.Device.OlderFlows[0])
	if _, err := encodeRequest(request{kind: kindAdd, workload: w}); err == nil {
		t.Error("one flow too many was encoded")
	}
}

func TestNackIsShort(t *testing.T) {
	for _, text := range []string{strings.Repeat("x", 5000), strings.Repeat("ü", 5000), "a\xffb"} {
		b, err := encodeResponse(response{text: text})
		if err != nil || len(b) > maxReply {
			t.Errorf("nack of %d bytes takes %d, %v", len(text), len(b), err)
		}
		got, err := decodeResponse(b)
		if err != nil || !utf8.ValidString(got.text) || got.text == "" {
			t.Errorf("nack came back as %q, %v", got.text, err)
		}
	}
}

func FuzzRequest(f *testing.F) {
	for _, r := range []request{
		{kind: kindAdd, workload: workload("u")},
		{kind: kindAdd, workload: fullWorkload("u")},
		{kind: kindAdd, workload: fullWorkload("u"), icmp: MaxICMP},
		{kind: kindAdd, workload: fullWorkload("u"), predecessor: true, part: portParts},
		{kind: kindKeep, workload: Workload{UID: "u"}, lend: true},
		{kind: kindYield, workload: Workload{UID: "u"}},
		{kind: kindKeep, workload: Workload{UID: "u"}},
		{kind: kindDel, workload: Workload{UID: "u"}},
		{kind: kindSnapshotSent},
	} {
		b, err := encodeRequest(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		for range 4 {
			cut := bytes.Clone(b)
			if len(cut) > 2 {
				cut[rand.IntN(len(cut))] ^= byte(1 << rand.IntN(8))
			}
			f.Add(cut)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRequest(b)
		if err != nil || len(b) > maxPacket {
			return
		}
		again, err := encodeRequest(r)
		if err != nil {
			t.Fatalf("%+v was decoded but cannot be encoded: %v", r, err)
		}
		r2, err := decodeRequest(again)
		if err != nil || !reflect.DeepEqual(r2, r) {
			t.Fatalf("%+v came back as %+v, %v", r, r2, err)
		}
	})
}

// FuzzReply covers what a proxy sends: the hello and the answers.
func FuzzReply(f *testing.F) {
	hello, _ := encodeHello(hello{})
	ack, _ := encodeResponse(response{})
	nack, _ := encodeResponse(response{text: "could not"})
	ours, _ := encodeHello(helloOfOurs)
	reads, _ := encodeResponse(response{holding: holding{reads: true, deviceID: "one", offload: true, icmp: 2}})
	yielded, _ := encodeResponse(response{holding: holding{yielded: true}})
	for _, b := range [][]byte{hello, ack, nack, ours, reads, yielded, nil, {0x08, 0x02}} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := decodeHello(b); err == nil {
			again, err := encodeHello(h)
			if err != nil {
				t.Fatalf("%+v: %v", h, err)
			}
			if got, err := decodeHello(again); err != nil || got != h {
				t.Fatalf("%+v came back as %+v, %v", h, got, err)
			}
		}
		r, err := decodeResponse(b)
		if err != nil {
			return
		}
		again, err := encodeResponse(r)
		if err != nil {
			t.Fatalf("%+v: %v", r, err)
		}
		if got, err := decodeResponse(again); err != nil || got != r {
			t.Fatalf("%+v came back as %+v, %v", r, got, err)
		}
	})
}
