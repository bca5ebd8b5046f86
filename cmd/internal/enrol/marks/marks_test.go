package marks

import (
	"fmt"
	"strings"
	"testing"

	"github.com/ztun/ztun/tun/podnet"
)

func TestBool(t *testing.T) {
	for s, want := range map[string]bool{"1": true, "t": true, "T": true, "TRUE": true, "true": true, "True": true, "0": false, "false": false, "F": false} {
		if got := Bool(s, !want); got != want {
			t.Errorf("Bool(%q) = %v", s, got)
		}
	}
	for _, s := range []string{"", "yes", "tRue", " true"} {
		if !Bool(s, true) || Bool(s, false) {
			t.Errorf("Bool(%q) is not what it is otherwise", s)
		}
	}
}

func TestInterfacesAreBounded(t *testing.T) {
	var list []string
	for i := range 2 * MaxInterfaces {
		list = append(list, fmt.Sprintf("br%d", i))
	}
	if names, wrong := Interfaces(strings.Join(list, ",")); len(names) != MaxInterfaces || wrong == "" {
		t.Errorf("%d interfaces, %q left out", len(names), wrong)
	}
}

// FuzzInterfaces: whatever the annotation says, podnet takes what is left.
func FuzzInterfaces(f *testing.F) {
	f.Add("br0, veth1,,br0")
	f.Add(strings.Repeat("a,", 40) + "a-name-that-is-too-long,lo,ztun0,a/b")
	f.Fuzz(func(t *testing.T, list string) {
		names, _ := Interfaces(list)
		cfg := podnet.Config{Device: podnet.DefaultDevice, VirtualInterfaces: names}
		if err := cfg.Validate(); err != nil || len(names) > MaxInterfaces {
			t.Errorf("%d names, %v", len(names), err)
		}
		for _, name := range names {
			if !strings.Contains(list, name) {
				t.Errorf("interface %q is not in %q", name, list)
			}
		}
	})
}
