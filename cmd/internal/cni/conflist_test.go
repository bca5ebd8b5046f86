package cni

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

var entry = wire.Conf{Type: wire.PluginType, RunDir: "/var/run/istio-cni", PodNamespace: "istio-system", ExcludeNamespaces: []string{"kube-system"}}

const entryText = `{"type":"ztun-cni","cni_agent_run_dir":"/var/run/istio-cni","pod_namespace":"istio-system","exclude_namespaces":["kube-system"]}`

// bridge is a chain in the form that people write, with numbers and an order of
// keys that decoding and encoding again would not keep.
const bridge = `{
  "name": "pods", "cniVersion": "1.0.0",
  "plugins": [
    {"type": "bridge", "mtu": 1500.0, "bridge": "cni0", "big": 12345678901234567890},
    {
      "type": "portmap",
      "capabilities": {"portMappings": true}
    }
  ],
  "x": "]},"
}
`

func mustParse(t *testing.T, text string) *list {
	t.Helper()
	l, err := parseList([]byte(text))
	if err != nil {
		t.Fatalf("parseList(%s) = %v", text, err)
	}
	return l
}

func kinds(l *list) string {
	var all []string
	for _, e := range l.plugins {
		all = append(all, e.kind)
	}
	return strings.Join(all, " ")
}

func TestEntryIsLastAndOnce(t *testing.T) {
	old := strings.Replace(entryText, "istio-system", "elsewhere", 1)
	for _, tt := range []struct{ name, text, want string }{
		{"alone", `{"name":"n","plugins":[{"type":"a"}]}`, `{"name":"n","plugins":[{"type":"a"},` + entryText + `]}`},
		{"there already", `{"name":"n","plugins":[{"type":"a"},` + entryText + `]}`, `{"name":"n","plugins":[{"type":"a"},` + entryText + `]}`},
		{"in another form", `{"name":"n","plugins":[{"type":"a"}, {"pod_namespace":"istio-system", "exclude_namespaces":["kube-system"], "cni_agent_run_dir":"/var/run/istio-cni","type":"ztun-cni"}]}`, ""},
		{"old", `{"name":"n","plugins":[{"type":"a"},` + old + `]}`, `{"name":"n","plugins":[{"type":"a"},` + entryText + `]}`},
		{"first", `{"name":"n","plugins":[` + entryText + `, {"type":"a"}]}`, `{"name":"n","plugins":[{"type":"a"},` + entryText + `]}`},
		{"between", `{"name":"n","plugins":[{"type":"a"},` + entryText + `,{"type":"b"}]}`, `{"name":"n","plugins":[{"type":"a"},{"type":"b"},` + entryText + `]}`},
		{"many", `{"name":"n","plugins":[` + old + `,` + old + `,{"type":"a"},` + old + `,{"type":"b"},` + entryText + `,` + entryText + `]}`,
			`{"name":"n","plugins":[{"type":"a"},{"type":"b"},` + entryText + `]}`},
		{"with a field of nobody", `{"name":"n","plugins":[{"type":"a"},` + strings.Replace(entryText, "{", `{"y":1,`, 1) + `]}`,
			`{"name":"n","plugins":[{"type":"a"},` + entryText + `]}`},
	} {
		got, err := mustParse(t, tt.text).with(entry)
		want := tt.want
		if want == "" {
			want = tt.text
		}
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v; want %s", tt.name, got, err, want)
		}
	}
}

func TestListIsGivenBackToTheByte(t *testing.T) {
	text, err := mustParse(t, bridge).with(entry)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "},\n    "+entryText+"\n  ],") {
		t.Errorf("the entry is not laid out as its neighbours: %s", text)
	}
	l := mustParse(t, string(text))
	if got := kinds(l); got != "bridge portmap ztun-cni" {
		t.Errorf("plugins = %s", got)
	}
	if got := l.without(); string(got) != bridge {
		t.Errorf("without = %s, want %s", got, bridge)
	}
}

func TestWrap(t *testing.T) {
	const conf = " \n{\"type\": \"ptp\", \"name\": \"pods\", \"cniVersion\": \"0.4.0\", \"mtu\": 1.50e3}\n"
	text, err := wrap([]byte(conf))
	if err != nil {
		t.Fatal(err)
	}
	c := entry
	c.WrappedFrom = "10-x.conf"
	text, err = mustParse(t, string(text)).with(c)
	if err != nil {
		t.Fatal(err)
	}
	list, err := libcni.NetworkConfFromBytes(text)
	if err != nil || list.Name != "pods" || list.CNIVersion != "0.4.0" || len(list.Plugins) != 2 {
		t.Fatalf("wrapped: %+v, %v: %s", list, err, text)
	}
	name, got, ok := mustParse(t, string(text)).unwrap()
	if !ok || name != "10-x.conf" || string(got) != conf {
		t.Errorf("unwrap = %q, %q, %v; want %q", name, got, ok, conf)
	}
	// Somebody added a plugin since, or the name leads elsewhere.
	more := strings.Replace(string(text), `"plugins":[`, `"plugins":[{"type":"new"},`, 1)
	if _, _, ok := mustParse(t, more).unwrap(); ok {
		t.Error("a list of two was unwrapped")
	}
	for _, bad := range []string{"../10-x.conf", "10-x.conflist", ".conf", "/etc/x.conf", ""} {
		c.WrappedFrom = bad
		text, err := mustParse(t, string(text)).with(c)
		if err != nil {
			t.Fatal(err)
		}
		if name, _, ok := mustParse(t, string(text)).unwrap(); ok {
			t.Errorf("unwrapped to %q", name)
		}
	}
	if text, err := wrap([]byte(`{"type":"ptp"}`)); err != nil || string(text) != `{"cniVersion":"0.3.1","name":"k8s-pod-network","plugins":[{"type":"ptp"}]}`+"\n" {
		t.Errorf("wrap without name = %s, %v", text, err)
	}
}

func TestMalformedLists(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"", "unexpected end"},
		{"{\n \"name\": \"n\",\n  nonsense\n}", "line 3, column 3"},
		{`{"name":"n","plugins":[{"type":"a"}]} x`, "line 1, column 39"},
		{`{"name":"n","plugins":[{"type":"a"}]`, "unexpected end"},
		{`[]`, "cannot unmarshal"},
		{`{"plugins":[{"type":"a"}]}`, "no name"},
		{`{"name":"n"}`, "no plugins"},
		{`{"name":"n","plugins":[]}`, "no plugins"},
		{`{"name":"n","plugins":{}}`, "invalid 'plugins' type"},
		{`{"name":"n","plugins":[1]}`, "plugin"},
		{`{"name":"n","plugins":[{"x":1}]}`, "missing 'type'"},
		{`{"name":"n","plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}`, "twice"},
	} {
		if _, err := parseList([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("parseList(%s) = %v, want an error that says %q", tt.text, err, tt.want)
		}
	}
}

// FuzzList holds the editing of text against the editing of decoded values.
func FuzzList(f *testing.F) {
	f.Add([]byte(bridge))
	f.Add([]byte(`{"name":"n","plugins":[` + entryText + `,{"type":"a"},` + entryText + `,{"type":"b"}]}`))
	f.Add([]byte(`{"plugins" : [ {"type":"a"} ] , "name":"n"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := parseList(text)
		if err != nil {
			return
		}
		others := decoded(t, text)
		if len(others) == 0 {
			if l.without() != nil {
				t.Fatalf("without = %s, and yet there is nothing else", l.without())
			}
			return
		}
		got, err := l.with(entry)
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(decoded(t, got)) != fmt.Sprint(others) {
			t.Fatalf("%s: the others are not what they were in %s", got, text)
		}
		again, err := parseList(got)
		if err != nil {
			t.Fatalf("%s: %v", got, err)
		}
		if c := again.own(); c == nil || again.plugins[len(again.plugins)-1].kind != wire.PluginType {
			t.Fatalf("%s: no entry at the end", got)
		}
		if !l.has(wire.PluginType) && string(again.without()) != string(text) {
			t.Fatalf("%s: given back as %s", text, again.without())
		}
	})
}

// decoded are the plugins of others.
func decoded(t *testing.T, text []byte) (others []any) {
	var plugins []json.RawMessage
	top := map[string]json.RawMessage{}
	if err := json.Unmarshal(text, &top); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(top["plugins"], &plugins); err != nil {
		t.Fatal(err)
	}
	for _, p := range plugins {
		if conf, err := libcni.NetworkPluginConfFromBytes(p); err != nil || conf.Network.Type != wire.PluginType {
			others = append(others, string(p))
		}
	}
	return others
}
