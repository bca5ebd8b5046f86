package cluster

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestModes(t *testing.T) {
	for text, want := range map[string][2]string{
		"": {"nftables", "iptables"}, "mixed": {"nftables", "iptables"}, "nftables": {"nftables", "nftables"}, "iptables": {"iptables", "iptables"},
	} {
		if got, err := Modes(text); err != nil || got != want {
			t.Errorf("Modes(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
	if _, err := Modes("ipvs"); err == nil || !strings.Contains(err.Error(), `MODE="ipvs"`) {
		t.Errorf("ipvs: %v", err)
	}
}

func TestNeedsNamesEverything(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	err := Needs()
	if err == nil {
		t.Fatal("a machine without any program is enough")
	}
	for name, from := range programs {
		if !strings.Contains(err.Error(), name+" ("+from+")") {
			t.Errorf("%s of %s is not in: %v", name, from, err)
		}
	}
}

// Addresses of a node must be in the networks that the daemons are told of, and of one family each.
func TestAddresses(t *testing.T) {
	networks := strings.Split(podNetworks, ",")
	for family, text := range networks {
		network := netip.MustParsePrefix(text)
		for i := byte(1); i <= 2; i++ {
			pods, node, host := nodePods(i)[family], nodeAddresses(i)[family], hostAddresses[family]
			if !network.Contains(pods.Addr()) || network.Bits() >= pods.Bits() || pods != pods.Masked() {
				t.Errorf("node %d has pods %v, not of %v", i, pods, network)
			}
			if node.Masked() != host.Masked() || node == host {
				t.Errorf("node %d is %v, the control plane %v", i, node, host)
			}
			if pods.Overlaps(nodePods(3 - i)[family]) {
				t.Errorf("%v overlaps with the other node's", pods)
			}
		}
		if !strings.Contains(systemObjects, hostAddresses[family].Addr().String()) {
			t.Errorf("no endpoint %v", hostAddresses[family])
		}
	}
	if !strings.Contains(systemObjects, "clusterIP: "+dnsService) {
		t.Errorf("DNS is not %s", dnsService)
	}
}

func TestOneRunPreparesAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(path)
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the lock is not held: %v", err)
	}
	second := make(chan error, 1)
	go func() {
		unlock, err := lock(path)
		if err == nil {
			unlock()
		}
		second <- err
	}()
	unlock()
	if err := <-second; err != nil {
		t.Errorf("the second run: %v", err)
	}
}
