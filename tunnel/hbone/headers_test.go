package hbone_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ztun/ztun/tunnel/hbone"
)

func TestParseAuthority(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.2:8080":                       "10.0.0.2:8080",
		"[2001:db8::1]:80":                    "[2001:db8::1]:80",
		"[::ffff:10.0.0.2]:8080":              "10.0.0.2:8080",
		"server.default.svc.cluster.local:80": "server.default.svc.cluster.local:80",
		"*.example.com:443":                   "*.example.com:443",
		"a_b:1":                               "a_b:1",
		"nonsense":                            "",
		"":                                    "",
		":80":                                 "",
		"host:":                               "",
		"host:0":                              "",
		"host:+80":                            "",
		"host:-1":                             "",
		"host:65536":                          "",
		"host: 80":                            "",
		"::1:80":                              "",
		"[::1]":                               "",
		"[::1:80":                             "",
		"[::1%eth0]:80":                       "",
		"[10.0.0.1]:80":                       "",
		"user@host:80":                        "",
		"a b:80":                              "",
		"höst:80":                             "",
		strings.Repeat("a", 256) + ":80":      "",
	} {
		a, err := hbone.ParseAuthority(in)
		got := ""
		if err == nil {
			got = a.String()
		}
		if got != want {
			t.Errorf("ParseAuthority(%.40q) = %q, %v, want %q", in, got, err, want)
		}
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, s := range []string{"10.0.0.2:8080", "[2001:db8::1]:80", "[::ffff:1.2.3.4]:1", "h.example:443", ":", "[::1]:", "a:99999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := hbone.ParseAuthority(s)
		if err != nil {
			return
		}
		again, err := hbone.ParseAuthority(a.String())
		if err != nil || again != a {
			t.Errorf("ParseAuthority(%q) = %v, and its text gives %v, %v", s, a, again, err)
		}
		if ap, ok := a.AddrPort(); ok == (a.Host != "") || ok && (ap.Addr().Is4In6() || ap.Port() == 0) {
			t.Errorf("ParseAuthority(%q) = %+v", s, a)
		}
	})
}

// The texts are those of golden/hbone.txt.
func TestBaggageAsRecorded(t *testing.T) {
	for text, want := range map[string]hbone.Baggage{
		"k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=client,service.name=client,service.version=v1,cloud.region=r1,cloud.availability_zone=z1": {
			Cluster: "Kubernetes", Namespace: "default", WorkloadType: "deployment", Workload: "client", Service: "client", Revision: "v1", Region: "r1", Zone: "z1",
		},
		"": {},
	} {
		if got := want.String(); got != text {
			t.Errorf("String = %q, want %q", got, text)
		}
		got, err := hbone.ParseBaggage([]string{text})
		if err != nil {
			t.Error(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("ParseBaggage(%q): %s", text, d)
		}
	}
	untyped := hbone.Baggage{Cluster: "Kubernetes", Namespace: "default", Workload: "server", Service: "server", Revision: "v2"}
	if got, want := untyped.String(), "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s..name=server,service.name=server,service.version=v2"; got != want {
		t.Errorf("String = %q, want %q", got, want)
	}
}

func TestParseBaggageOfStrangers(t *testing.T) {
	got, err := hbone.ParseBaggage([]string{"unknown=1,service.name=a=b,service.version=", "cloud.region=r,,=,x", "k8s.job.name=j"})
	want := hbone.Baggage{Service: "a", Region: "r", WorkloadType: "job", Workload: "j"}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("ParseBaggage: %v %s", err, d)
	}
	if got, err := hbone.ParseBaggage([]string{"service.name=ok,cloud.region=é"}); err == nil || got != (hbone.Baggage{}) {
		t.Errorf("a value outside of ASCII gave %+v, %v", got, err)
	}
}

func FuzzParseBaggage(f *testing.F) {
	f.Add("k8s.cluster.name=Kubernetes,k8s.namespace.name=default", "service.name=x")
	f.Add(",,==,", "k8s..name=x")
	f.Fuzz(func(t *testing.T, a, b string) {
		got, err := hbone.ParseBaggage([]string{a, b})
		if err != nil {
			return
		}
		again, err := hbone.ParseBaggage([]string{got.String()})
		if err != nil || again != got {
			t.Errorf("%q %q gave %+v, and its text gives %+v, %v", a, b, got, again, err)
		}
	})
}

func TestForwarded(t *testing.T) {
	for want, in := range map[string]struct{ client, host string }{
		`for="127.0.0.1:80"`:                  {"127.0.0.1:80", ""},
		`for="[::1]:80"`:                      {"[::1]:80", ""},
		`for="127.0.0.1:80";host=example.com`: {"127.0.0.1:80", "example.com"},
	} {
		if got := hbone.Forwarded(netip.MustParseAddrPort(in.client), in.host); got != want {
			t.Errorf("Forwarded(%v) = %s, want %s", in, got, want)
		}
		if got := hbone.ForwardedHost(want); got != in.host {
			t.Errorf("ForwardedHost(%s) = %q, want %q", want, got, in.host)
		}
	}
	for in, want := range map[string]string{
		`host="a.b"`:            "a.b",
		`for=x; host=a ;host=b`: "a",
		`host="`:                `"`,
		`host=""`:               "",
		`for=é;host=a`:          "",
		`Host=a`:                "",
		`for="[::1]";by=1`:      "",
	} {
		if got := hbone.ForwardedHost(in); got != want {
			t.Errorf("ForwardedHost(%s) = %q, want %q", in, got, want)
		}
	}
}

func FuzzForwardedHost(f *testing.F) {
	f.Add(`for="127.0.0.1:80";host=example.com`)
	f.Add(`host="`)
	f.Fuzz(func(t *testing.T, s string) {
		if host := hbone.ForwardedHost(s); !strings.Contains(s, host) {
			t.Errorf("ForwardedHost(%q) = %q", s, host)
		}
	})
}

func TestTrace(t *testing.T) {
	const text = "00-de2125704fb28b9e70a719a9fdae6244-0c0778d787e993a7-00"
	got, ok := hbone.ParseTrace(text)
	if !ok || got.String() != text {
		t.Errorf("ParseTrace(%s) = %v, %v", text, got, ok)
	}
	for _, bad := range []string{"", text[1:], text + "0", strings.Replace(text, "-", "_", 1), strings.Replace(text, "d", "x", 1)} {
		if got, ok := hbone.ParseTrace(bad); ok {
			t.Errorf("ParseTrace(%q) = %v", bad, got)
		}
	}
	if a, b := hbone.NewTrace(), hbone.NewTrace(); a == b {
		t.Error("two traces are the same")
	}
}

func FuzzParseTrace(f *testing.F) {
	f.Add("00-de2125704fb28b9e70a719a9fdae6244-0c0778d787e993a7-00")
	f.Fuzz(func(t *testing.T, s string) {
		if got, ok := hbone.ParseTrace(s); ok {
			if again, ok := hbone.ParseTrace(got.String()); !ok || again != got {
				t.Errorf("ParseTrace(%q) = %v, again %v", s, got, again)
			}
		}
	})
}

func TestProxyStatus(t *testing.T) {
	if got, want := hbone.ProxyStatus(hbone.ConnectionRefused), "ztun; error=connection_refused"; got != want {
		t.Errorf("ProxyStatus = %q, want %q", got, want)
	}
	for in, want := range map[string]hbone.ProxyError{
		"ztun; error=connection_refused":                                              hbone.ConnectionRefused,
		"a; error=connection_timeout, ztun; error=connection_refused":                 hbone.ConnectionRefused,
		`ztun; details="a, b; error=x"; error=destination_ip_unroutable;next-hop="y"`: hbone.DestinationIPUnroutable,
		`ztun; details="\"; error=x`:                                                  "",
		"ztun":                                                                        "",
		"":                                                                            "",
		"ztun; error=":                                                                "",
		"ztun; error=Connection Refused":                                              "",
		`ztun; error="connection_refused"`:                                            "",
	} {
		if got := hbone.ParseProxyStatus(in); got != want {
			t.Errorf("ParseProxyStatus(%s) = %q, want %q", in, got, want)
		}
	}
}

func FuzzParseProxyStatus(f *testing.F) {
	f.Add("ztun; error=connection_refused")
	f.Add(`a;b="\",;", ztun; error=x`)
	f.Fuzz(func(t *testing.T, s string) {
		e := hbone.ParseProxyStatus(s)
		if e != "" && hbone.ParseProxyStatus(hbone.ProxyStatus(e)) != e {
			t.Errorf("ParseProxyStatus(%q) = %q, which does not survive", s, e)
		}
	})
}
