package wire

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const event = `{"Netns":"/var/run/netns/cni-1","PodName":"a-1","PodNamespace":"demo","PodUID":"u-1",` +
	`"IPs":[{"Interface":2,"Address":"10.1.0.5/24","Gateway":"10.1.0.1"},{"Address":"fd00::5/64"}]}`

var compare = cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})}

func TestDecode(t *testing.T) {
	two := 2
	want := Event{Netns: "/var/run/netns/cni-1", PodName: "a-1", PodNamespace: "demo", PodUID: "u-1", IPs: []IP{
		{Interface: &two, Address: netip.MustParsePrefix("10.1.0.5/24"), Gateway: netip.MustParseAddr("10.1.0.1")},
		{Address: netip.MustParsePrefix("fd00::5/64")},
	}}
	got, err := Decode([]byte(event))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		t.Errorf("Decode (-want +got):\n%s", diff)
	}
	text, err := json.Marshal(got)
	if err != nil || string(text) != event {
		t.Errorf("encoded again: %s, %v; want %s", text, err, event)
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"", "EOF"},
		{"nonsense", "invalid character"},
		{event + "{}", "follows"},
		{`{}`, "Netns"},
		{strings.Replace(event, "/var/run/netns/cni-1", "netns/cni-1", 1), "Netns"},
		{strings.Replace(event, "/var/run/netns/cni-1", "/var/run/../../etc/passwd", 1), "Netns"},
		{strings.Replace(event, `"a-1"`, `""`, 1), "PodName"},
		{strings.Replace(event, `"a-1"`, `"a\nb"`, 1), "PodName"},
		{strings.Replace(event, `"demo"`, `"../demo"`, 1), "PodNamespace"},
		{strings.Replace(event, `"u-1"`, `"u/1"`, 1), "PodUID"},
		{strings.Replace(event, `"10.1.0.5/24"`, `""`, 1), "IPs[0]"},
		{strings.Replace(event, `"10.1.0.5/24"`, `"10.1.0.5/99"`, 1), "netip"},
		{strings.Replace(event, `{"Address":"fd00::5/64"}`, strings.Repeat(`{"Address":"fd00::5/64"},`, 64)+`{"Address":"fd00::5/64"}`, 1), "more than 64"},
		{strings.Replace(event, "a-1", strings.Repeat("a", MaxEvent), 1), "more than 65536 bytes"},
	} {
		if _, err := Decode([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Decode(%.120q) = %v, want an error that says %q", tt.text, err, tt.want)
		}
	}
	if _, err := Decode([]byte(strings.Replace(event, `"PodUID":"u-1",`, "", 1))); err != nil {
		t.Errorf("without a UID: %v", err)
	}
}

// FuzzDecode holds what is accepted against its own encoding.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(event))
	f.Add([]byte(`{"Netns":"/a","PodName":"b","PodNamespace":"c","IPs":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		e, err := Decode(text)
		if err != nil {
			return
		}
		again, err := json.Marshal(e)
		if err != nil {
			t.Fatalf("%+v cannot be encoded: %v", e, err)
		}
		got, err := Decode(again)
		if err != nil && len(again) <= MaxEvent {
			t.Fatalf("%s is not read back: %v", again, err)
		}
		if diff := cmp.Diff(e, got, compare); err == nil && diff != "" {
			t.Errorf("read back (-first +second):\n%s", diff)
		}
	})
}
