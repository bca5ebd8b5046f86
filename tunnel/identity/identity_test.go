package identity_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztun/ztun/tunnel/identity"
)

func TestParse(t *testing.T) {
	long := "spiffe://td/ns/n/sa/" + strings.Repeat("a", identity.MaxLength)
	tests := []struct {
		in         string
		ok         bool
		td, ns, sa string
	}{
		{"spiffe://cluster.local/ns/default/sa/web", true, "cluster.local", "default", "web"},
		{"spiffe://td/ns//sa/", true, "td", "", ""},
		{"spiffe://td/ns/ns/sa/sa", true, "td", "ns", "sa"},
		{"spiffe://TD.Example/ns/N_1/sa/a.b-c", true, "TD.Example", "N_1", "a.b-c"},
		{"spiffe://u@td:1/ns/../sa/a%2Fb?q#f", true, "u@td:1", "..", "a%2Fb?q#f"},
		{long[:identity.MaxLength], true, "td", "n", strings.Repeat("a", identity.MaxLength-20)},
		{long[:identity.MaxLength+1], false, "", "", ""},
		{"", false, "", "", ""},
		{"spiffe://", false, "", "", ""},
		{"spiffe:///ns/default/sa/web", false, "", "", ""},
		{"SPIFFE://td/ns/default/sa/web", false, "", "", ""},
		{"spiffe:/td/ns/default/sa/web", false, "", "", ""},
		{"https://td/ns/default/sa/web", false, "", "", ""},
		{"td/ns/default/sa/web", false, "", "", ""},
		{" spiffe://td/ns/default/sa/web", false, "", "", ""},
		{"spiffe://td/ns/default/sa", false, "", "", ""},
		{"spiffe://td/ns/default/sa/web/", false, "", "", ""},
		{"spiffe://td/ns/default/sa/web/x", false, "", "", ""},
		{"spiffe://td//ns/default/sa/web", false, "", "", ""},
		{"spiffe://td/NS/default/sa/web", false, "", "", ""},
		{"spiffe://td/ns/default/SA/web", false, "", "", ""},
		{"spiffe://td/sa/default/ns/web", false, "", "", ""},
		{"spiffe://td/ns/de fault/sa/web", false, "", "", ""},
		{"spiffe://td/ns/default/sa/web\n", false, "", "", ""},
		{"spiffe://td/ns/default/sa/w\x00b", false, "", "", ""},
		{"spiffe://td/ns/default/sa/wéb", false, "", "", ""},
	}
	for _, tt := range tests {
		id, err := identity.Parse(tt.in)
		if (err == nil) != tt.ok {
			t.Errorf("Parse(%.64q) error %v, want ok %v", tt.in, err, tt.ok)
			continue
		}
		if err != nil {
			if !id.IsZero() {
				t.Errorf("Parse(%.64q) = %v with an error", tt.in, id)
			}
			continue
		}
		if id.String() != tt.in || "spiffe://"+id.Principal() != tt.in {
			t.Errorf("Parse(%.64q) is %q, principal %q", tt.in, id.String(), id.Principal())
		}
		if id.TrustDomain() != tt.td || id.Namespace() != tt.ns || id.ServiceAccount() != tt.sa {
			t.Errorf("Parse(%.64q) = %q %q %q, want %q %q %q", tt.in, id.TrustDomain(), id.Namespace(), id.ServiceAccount(), tt.td, tt.ns, tt.sa)
		}
		again, err := identity.New(tt.td, tt.ns, tt.sa)
		if err != nil || again != id {
			t.Errorf("New(%q, %q, %q) = %v, %v, want %v", tt.td, tt.ns, tt.sa, again, err, id)
		}
	}
}

func TestNewRefusesSlashes(t *testing.T) {
	for _, parts := range [][3]string{{"td/ns", "a", "b"}, {"td", "a/sa/x", "b"}, {"td", "a", "b/c"}, {"", "a", "b"}} {
		if id, err := identity.New(parts[0], parts[1], parts[2]); err == nil {
			t.Errorf("New(%q) = %v, want an error", parts, id)
		}
	}
}

func TestZeroIsNobody(t *testing.T) {
	var zero identity.ID
	if !zero.IsZero() || zero.String() != "" || zero.Principal() != "" || zero.TrustDomain() != "" || zero.Namespace() != "" || zero.ServiceAccount() != "" {
		t.Errorf("the zero ID has parts: %q", zero)
	}
	if id := identity.MustParse("spiffe://td/ns//sa/"); id.IsZero() || id == zero {
		t.Error("an ID with empty parts equals the zero ID")
	}
}

func TestJSON(t *testing.T) {
	type doc struct{ ID identity.ID }
	for _, want := range []doc{{}, {identity.MustParse("spiffe://td/ns/a/sa/b")}} {
		text, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got doc
		if err := json.Unmarshal(text, &got); err != nil || got != want {
			t.Errorf("%s gives %v, %v, want %v", text, got, err, want)
		}
	}
	var d doc
	if err := json.Unmarshal([]byte(`{"ID":"spiffe://td"}`), &d); err == nil {
		t.Error("Unmarshal took what Parse does not")
	}
}

func TestAccessorsDoNotAllocate(t *testing.T) {
	id := identity.MustParse("spiffe://cluster.local/ns/default/sa/web")
	if n := testing.AllocsPerRun(100, func() {
		_, _, _, _, _ = id.String(), id.Principal(), id.TrustDomain(), id.Namespace(), id.ServiceAccount()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzParse checks that what Parse takes comes back byte for byte, whole and
// in parts, and that every SPIFFE ID of Istio's shape, by go-spiffe's own
// grammar, is taken.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"spiffe://cluster.local/ns/default/sa/web", "spiffe://td/ns//sa/", "spiffe://td/ns/a/sa/b/", "spiffe:///ns/a/sa/b",
		"spiffe://td/ns/a/sa/b?c", "spiffe://td/ns/a%2fb/sa/c", "td/ns/a/sa/b", "spiffe://td/ns/.../sa/_",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := identity.Parse(s)
		if err == nil {
			if id.String() != s {
				t.Fatalf("Parse(%q).String() = %q", s, id.String())
			}
			again, err := identity.New(id.TrustDomain(), id.Namespace(), id.ServiceAccount())
			if err != nil || again != id {
				t.Fatalf("New of the parts of %q = %v, %v", s, again, err)
			}
		}
		strict, serr := spiffeid.FromString(s)
		if serr != nil {
			return
		}
		parts := strings.Split(strict.Path(), "/")
		shaped := len(parts) == 5 && parts[1] == "ns" && parts[3] == "sa" && len(s) <= identity.MaxLength
		if shaped != (err == nil) {
			t.Fatalf("Parse(%q) error %v, but it is a SPIFFE ID of our shape: %v", s, err, shaped)
		}
		if shaped && (strict.String() != id.String() || strict.TrustDomain().Name() != id.TrustDomain()) {
			t.Fatalf("Parse(%q) = %v, go-spiffe has %v", s, id, strict)
		}
	})
}
