package procs

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
)

// find closes what it found at the end of the test.
func find(t *testing.T, proc string, targets ...Target) map[string]*os.File {
	t.Helper()
	return findBy(t, Finder{Proc: proc}, targets...)
}

func findBy(t *testing.T, f Finder, targets ...Target) map[string]*os.File {
	t.Helper()
	found, err := f.Find(t.Context(), targets)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, f := range found {
			_ = f.Close()
		}
	})
	return found
}

func wantFound(t *testing.T, found map[string]*os.File, want map[string]*netnstest.NS) {
	t.Helper()
	if got, want := slices.Sorted(maps.Keys(found)), slices.Sorted(maps.Keys(want)); !slices.Equal(got, want) {
		t.Fatalf("found %v, want %v", got, want)
	}
	for uid, ns := range want {
		if identityOf(t, found[uid]) != identityOf(t, ns.File()) {
			t.Errorf("pod %s: found another namespace", uid)
		}
	}
}

func TestFindMatchesCgroupAndAddress(t *testing.T) {
	proc := newTable(t)
	a, b := podNS(t, "a", "10.0.0.1/24", "fd00::1/64"), podNS(t, "b", "10.0.0.2/24")
	proc.add(10, "pause", 100, cgroupOf(uidA, idA), a)
	proc.add(11, "app", 200, cgroupOf(uidA, idB), a)
	proc.add(20, "pause", 100, cgroupOf(uidB, idA), b)
	proc.add(30, "containerd-shim", 90, "0::/system.slice/containerd.service\n", a)
	wantFound(t, find(t, proc.dir, Target{UID: uidA, Addresses: addrs("10.0.0.1")}, Target{UID: uidB, Addresses: addrs("10.0.0.2")}),
		map[string]*netnstest.NS{uidA: a, uidB: b})
	for _, tt := range []struct {
		name      string
		addresses []string
		want      bool
	}{
		{"either family", []string{"192.0.2.1", "fd00::1"}, true},
		{"mapped", []string{"::ffff:10.0.0.1"}, true},
		{"another pod's", []string{"10.0.0.2"}, false},
		{"none yet", nil, false},
	} {
		want := map[string]*netnstest.NS{}
		if tt.want {
			want[uidA] = a
		}
		t.Run(tt.name, func(t *testing.T) {
			wantFound(t, find(t, proc.dir, Target{UID: uidA, Addresses: addrs(tt.addresses...)}), want)
		})
	}
}

func TestFindTakesTheOldestProcess(t *testing.T) {
	proc := newTable(t)
	pod, nested := podNS(t, "pod", "10.0.0.1/24"), podNS(t, "nested", "10.0.0.1/24")
	proc.add(10, "app in a namespace of its own", 50, cgroupOf(uidA, idA), nested)
	proc.add(11, "pause", 49, cgroupOf(uidA, idB), pod)
	proc.add(12, "late", 300, cgroupOf(uidA, idB), pod)
	want := map[string]*netnstest.NS{uidA: pod}
	wantFound(t, find(t, proc.dir, Target{UID: uidA, Addresses: addrs("10.0.0.1")}), want)
	// It is the age of a namespace's oldest process that counts, in whichever
	// order they are seen.
	want[uidA] = nested
	for _, old := range []int{8, 9} {
		for _, pid := range []int{8, 9} {
			proc.remove(pid)
		}
		proc.add(old, "old", 10, cgroupOf(uidA, idA), nested)
		proc.add(8+9-old, "late", 5000, cgroupOf(uidA, idA), nested)
		proc.remove(10)
		wantFound(t, find(t, proc.dir, Target{UID: uidA, Addresses: addrs("10.0.0.1")}), want)
	}
}

// A tool of pod A that entered B's namespace does not make it A's, nor does
// it keep it from B.
func TestForeignProcessInAPod(t *testing.T) {
	proc := newTable(t)
	a, b := podNS(t, "a", "10.0.0.1/24"), podNS(t, "b", "10.0.0.2/24")
	proc.add(10, "nsenter", 1, cgroupOf(uidA, idA), b)
	proc.add(20, "pause", 100, cgroupOf(uidB, idB), b)
	targets := []Target{{UID: uidA, Addresses: addrs("10.0.0.1")}, {UID: uidB, Addresses: addrs("10.0.0.2")}}
	wantFound(t, find(t, proc.dir, targets...), map[string]*netnstest.NS{uidB: b})
	proc.add(30, "pause", 100, cgroupOf(uidA, idB), a)
	wantFound(t, find(t, proc.dir, targets...), map[string]*netnstest.NS{uidA: a, uidB: b})
}

func TestFindIsSureOrSilent(t *testing.T) {
	host := netnstest.New(t, "host")
	for _, tt := range []struct {
		name    string
		cgroup  string
		targets []Target
		host    bool
		want    bool
	}{
		{"as it should be", cgroupOf(uidA, idA), []Target{{UID: uidA, Addresses: addrs("10.0.0.1")}}, false, true},
		{"no cgroup of a pod", "0::/user.slice\n", []Target{{UID: uidA, Addresses: addrs("10.0.0.1")}}, false, false},
		{"cgroups of two pods", cgroupOf(uidA, idA) + cgroupOf(uidB, idA), []Target{{UID: uidA, Addresses: addrs("10.0.0.1")}}, false, false},
		{"container alone, unknown", "0::/crio-" + idA + "\n", []Target{{UID: uidA, Addresses: addrs("10.0.0.1")}}, false, false},
		{"container alone, known", "0::/crio-" + idA + "\n", []Target{{UID: uidA, Addresses: addrs("10.0.0.1"), Containers: []string{idA}}}, false, true},
		{"container of two pods", "0::/crio-" + idA + "\n", []Target{
			{UID: uidA, Addresses: addrs("10.0.0.1"), Containers: []string{idA}}, {UID: uidB, Addresses: addrs("10.0.0.1"), Containers: []string{idA}}}, false, false},
		{"another pod's container", cgroupOf(uidB, idA), []Target{{UID: uidA, Addresses: addrs("10.0.0.1"), Containers: []string{idA}}}, false, false},
		{"in the host's namespace", cgroupOf(uidA, idA), []Target{{UID: uidA, Addresses: addrs("10.0.0.1")}}, true, false},
		{"no UID at all", "0::/kubepods/pod/" + idA + "\n", []Target{{UID: "", Addresses: addrs("10.0.0.1")}}, false, false},
		{"UID that is none", "0::/kubepods/podx/" + idA + "\n", []Target{{UID: "x", Addresses: addrs("10.0.0.1")}}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proc := newTable(t)
			ns := podNS(t, "pod", "10.0.0.1/24")
			if tt.host {
				proc.remove(1)
				proc.add(1, "systemd", 1, "0::/\n", ns)
			}
			proc.add(10, "pause", 5, tt.cgroup, ns)
			proc.add(11, "host's", 5, tt.cgroup, host)
			want := map[string]*netnstest.NS{}
			if tt.want {
				want[uidA] = ns
			}
			wantFound(t, find(t, proc.dir, tt.targets...), want)
		})
	}
}

func TestNamespaceOfTwoPodsIsNobodys(t *testing.T) {
	proc := newTable(t)
	ns := podNS(t, "both", "10.0.0.1/24")
	proc.add(10, "pause", 5, cgroupOf(uidA, idA), ns)
	proc.add(11, "pause", 6, cgroupOf(uidB, idB), ns)
	wantFound(t, find(t, proc.dir, Target{UID: uidA, Addresses: addrs("10.0.0.1")}, Target{UID: uidB, Addresses: addrs("10.0.0.1")}), nil)
}

func TestOwnNamespaceIsNoPods(t *testing.T) {
	proc := newTable(t)
	netnstest.Require(t)
	dir := proc.dir + "/10"
	proc.add(10, "agent", 5, cgroupOf(uidA, idA), netnstest.New(t, "x"))
	proc.must(os.Remove(dir + "/ns/net"))
	proc.must(os.Symlink("/proc/self/ns/net", dir+"/ns/net"))
	wantFound(t, find(t, proc.dir, Target{UID: uidA, Addresses: addrs("127.0.0.1")}), nil)
}

func TestProcessesThatEndMeanwhile(t *testing.T) {
	proc := newTable(t)
	ns := podNS(t, "pod", "10.0.0.1/24")
	for pid, gone := range map[int]string{10: "ns/net", 11: "cgroup", 12: "stat"} {
		proc.add(pid, "ends", 1, cgroupOf(uidA, idA), ns)
		proc.must(os.Remove(proc.dir + "/" + []string{10: "10", 11: "11", 12: "12"}[pid] + "/" + gone))
	}
	proc.add(13, "pause", 5, cgroupOf(uidA, idA), ns)
	b := podNS(t, "b", "10.0.0.2/24")
	proc.add(14, "more than can be", 5, cgroupOf(uidB, idB)+strings.Repeat("x", maxCgroup), b)
	wantFound(t, find(t, proc.dir, Target{UID: uidA, Addresses: addrs("10.0.0.1")}, Target{UID: uidB, Addresses: addrs("10.0.0.2")}),
		map[string]*netnstest.NS{uidA: ns})
}

func TestFindNeedsTheHost(t *testing.T) {
	netnstest.Require(t)
	f := Finder{Proc: t.TempDir()}
	if found, err := f.Find(t.Context(), nil); !errors.Is(err, os.ErrNotExist) || found != nil {
		t.Errorf("without process 1: %v, %v", found, err)
	}
	proc := newTable(t)
	f.Proc = proc.dir
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Find(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}

func TestFindKeepsNothingOpenButWhatItReturns(t *testing.T) {
	proc := newTable(t)
	a, b := podNS(t, "a", "10.0.0.1/24"), podNS(t, "b", "10.0.0.9/24")
	proc.add(10, "pause", 5, cgroupOf(uidA, idA), a)
	proc.add(11, "elsewhere", 4, cgroupOf(uidA, idA), b)
	before := openFiles(t)
	f := Finder{Proc: proc.dir}
	found, err := f.Find(t.Context(), []Target{{UID: uidA, Addresses: addrs("10.0.0.1")}})
	if err != nil || len(found) != 1 {
		t.Fatalf("found %v, %v", found, err)
	}
	if err := f.Verify(t.Context(), found[uidA], Target{UID: uidA, Addresses: addrs("10.0.0.1")}); err != nil {
		t.Error(err)
	}
	_ = found[uidA].Close()
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors are open, %d were", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestVerify(t *testing.T) {
	proc := newTable(t)
	a, b := podNS(t, "a", "10.0.0.1/24"), podNS(t, "b", "10.0.0.2/24")
	proc.add(10, "pause", 100, cgroupOf(uidA, idA), a)
	proc.add(20, "pause", 100, cgroupOf(uidB, idB), b)
	f := Finder{Proc: proc.dir}
	target := Target{UID: uidA, Addresses: addrs("10.0.0.1")}
	verify := func(ns *netnstest.NS, target Target) error { return f.Verify(t.Context(), ns.File(), target) }
	if err := verify(a, target); err != nil {
		t.Error(err)
	}
	if err := verify(b, target); err == nil {
		t.Error("another pod's namespace was taken")
	}
	if err := verify(a, Target{UID: uidB, Addresses: addrs("10.0.0.1")}); err == nil {
		t.Error("another pod was taken")
	}
	if err := verify(a, Target{UID: uidA, Addresses: addrs("10.0.0.2")}); err == nil {
		t.Error("another address was taken")
	}
	if err := verify(a, Target{UID: uidA}); err == nil {
		t.Error("a pod without an address was taken")
	}
	if err := f.Verify(t.Context(), nil, target); err == nil {
		t.Error("no namespace was taken")
	}
	a.DelAddr("eth0", "10.0.0.1/24")
	if err := verify(a, target); err == nil {
		t.Error("taken without the address")
	}
	a.Addr("eth0", "10.0.0.1/24")
	proc.remove(10)
	if err := verify(a, target); err == nil || !strings.Contains(err.Error(), uidA) {
		t.Errorf("without a process: %v, want an error that names the pod", err)
	}
}

// Two pods as a node has them: real processes in real cgroups.
func TestFindRunningPods(t *testing.T) {
	a, b := podNS(t, "a", "10.0.0.1/24"), podNS(t, "b", "10.0.0.2/24", "fd00::2/64")
	pauseA, pauseB := running(t, a, "pause"), running(t, b, "pause")
	running(t, a, "stranger")
	enterCgroup(t, pauseA.Process.Pid, "/kubepods/burstable/pod"+uidA+"/"+idA)
	escaped := strings.ReplaceAll(uidB, "-", "_")
	enterCgroup(t, pauseB.Process.Pid, "/kubepods.slice/kubepods-pod"+escaped+".slice/cri-containerd-"+idB+".scope")
	t.Cleanup(func() { end(pauseA); end(pauseB) }) // Before their cgroups go.
	targetA, targetB := Target{UID: uidA, Addresses: addrs("10.0.0.1")}, Target{UID: uidB, Addresses: addrs("fd00::2")}
	own, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	f := Finder{Proc: "/proc", Host: own} // Process 1 may be out of reach where tests run.
	found := findBy(t, f, targetA, targetB)
	wantFound(t, found, map[string]*netnstest.NS{uidA: a, uidB: b})
	if err := f.Verify(t.Context(), found[uidA], targetA); err != nil {
		t.Error(err)
	}
	if err := f.Verify(t.Context(), found[uidA], targetB); err == nil {
		t.Error("A's namespace was taken for B's")
	}
	// What was found before the pod ended is refused after.
	p, err := openProcess("/proc", pauseA.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	end(pauseA)
	if err := f.Verify(t.Context(), found[uidA], targetA); err == nil {
		t.Error("verified after the pod's end")
	}
	// An open directory is that of the process that was, whoever has its PID.
	if err := p.readCgroup(); !isGone(err) {
		t.Errorf("cgroup of a process that ended: %v", err)
	}
	if err := p.claim(map[nsID]claim{}); err != nil {
		t.Errorf("claim of a process that ended: %v", err)
	}
	wantFound(t, findBy(t, f, targetA, targetB), map[string]*netnstest.NS{uidB: b})
	f.Host = b.File()
	wantFound(t, findBy(t, f, targetA, targetB), nil)
}
