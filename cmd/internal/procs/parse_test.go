package procs

import (
	"errors"
	"strings"
	"testing"
)

const uidDigits = "0a1b2c3d00004000800000000000000a"

func TestCgroupOfEveryLayout(t *testing.T) {
	escaped := strings.ReplaceAll(uidA, "-", "_")
	other := strings.ReplaceAll(uidB, "-", "_")
	for _, tt := range []struct {
		name, text string
		want       cgroup
		err        error
	}{
		{"host", "0::/system.slice/sshd.service\n", cgroup{}, nil},
		{"root", "0::/\n", cgroup{}, nil},
		{"empty", "", cgroup{}, nil},
		{"no colons", "nonsense\n1:cpu\n", cgroup{}, nil},
		{"v1 cgroupfs", "12:memory:/kubepods/burstable/pod" + uidA + "/" + idA + "\n1:name=systemd:/kubepods/burstable/pod" + uidA + "/" + idA + "\n",
			cgroup{uidDigits, idA}, nil},
		{"v1 one hierarchy only", "8:pids:/\n4:memory:/kubepods/pod" + uidA + "/" + idA + "\n0::/\n", cgroup{uidDigits, idA}, nil},
		{"v2 systemd containerd", "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + escaped + ".slice/cri-containerd-" + idA + ".scope\n",
			cgroup{uidDigits, idA}, nil},
		{"v2 guaranteed", "0::/kubepods.slice/kubepods-pod" + escaped + ".slice/cri-containerd-" + idA + ".scope", cgroup{uidDigits, idA}, nil},
		{"containerd of an old configuration", "0::/system.slice/containerd.service/kubepods-besteffort-pod" + escaped + ".slice:cri-containerd:" + idA + "\n",
			cgroup{uidDigits, idA}, nil},
		{"docker", "3:cpu:/kubepods.slice/kubepods-pod" + escaped + ".slice/docker-" + idA + ".scope\n", cgroup{uidDigits, idA}, nil},
		{"CRI-O", "0::/kubepods.slice/kubepods-pod" + escaped + ".slice/crio-" + idA + ".scope/container\n", cgroup{uidDigits, idA}, nil},
		{"CRI-O's monitor", "0::/kubepods.slice/kubepods-pod" + escaped + ".slice/crio-conmon-" + idA + ".scope\n", cgroup{uidDigits, idA}, nil},
		{"KubeEdge", "0::/../crio-" + idA + "\n", cgroup{"", idA}, nil},
		{"CRI-O without a pod", "0::/machine.slice/crio-" + idA + ".scope\n", cgroup{"", idA}, nil},
		{"from a cgroup namespace", "0::/../../kubepods-burstable-pod" + escaped + ".slice/cri-containerd-" + idA + ".scope\n", cgroup{uidDigits, idA}, nil},
		{"static pod", "0::/kubepods/pod" + uidDigits + "/" + idA + "\n", cgroup{uidDigits, idA}, nil},
		{"capitals", "0::/kubepods/pod" + strings.ToUpper(uidA) + "/" + idA + "\n", cgroup{uidDigits, idA}, nil},
		{"pod's own cgroup", "0::/kubepods/pod" + uidA + "\n", cgroup{uidDigits, ""}, nil},
		{"node in a container", "0::/docker/" + idB + "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + escaped + ".slice/cri-containerd-" + idA + ".scope\n",
			cgroup{uidDigits, idA}, nil},
		{"node in a container of CRI-O", "0::/crio-" + idB + ".scope/kubepods/pod" + uidA + "/" + idA + "\n", cgroup{uidDigits, idA}, nil},
		{"container in a container", "0::/kubepods/pod" + uidA + "/" + idA + "/docker/" + idB + "\n", cgroup{uidDigits, idA}, nil},
		{"container of docker alone", "0::/docker/" + idA + "\n", cgroup{}, nil},
		{"pod in a pod", "0::/kubepods/pod" + uidA + "/" + idA + "/kubepods/pod" + uidB + "/" + idB + "\n", cgroup{}, errManyPods},
		{"hierarchies that disagree", "2:cpu:/kubepods/pod" + uidA + "/" + idA + "\n3:pids:/kubepods/pod" + uidB + "/" + idA + "\n", cgroup{}, errManyPods},
		{"one slice after the other", "0::/kubepods-pod" + escaped + ".slice/kubepods-pod" + other + ".slice\n", cgroup{}, errManyPods},
		{"containers that disagree", "2:cpu:/kubepods/pod" + uidA + "/" + idA + "\n3:pids:/kubepods/pod" + uidA + "/" + idB + "\n", cgroup{}, errManyContainers},
		{"two containers and no pod", "0::/crio-" + idA + ".scope/crio-" + idB + ".scope\n", cgroup{}, errManyContainers},
		{"too few digits", "0::/kubepods/pod" + uidA[1:] + "/" + idA + "\n", cgroup{}, nil},
		{"too many digits", "0::/kubepods/pod" + uidA + "0/" + idA + "\n", cgroup{}, nil},
		{"dashes elsewhere", "0::/kubepods/pod0a1b2c3d0-000-4000-8000-00000000000a/" + idA + "\n", cgroup{}, nil},
		{"a word before", "0::/kubepods/mypod" + uidA + "/" + idA + "\n", cgroup{}, nil},
	} {
		got, err := parseCgroup(tt.text)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("%s: parseCgroup(%q) = %+v, %v, want %+v, %v", tt.name, tt.text, got, err, tt.want, tt.err)
		}
	}
}

func TestStat(t *testing.T) {
	long := strings.Repeat("1 ", 18)
	for _, tt := range []struct {
		text string
		want stat
		ok   bool
	}{
		{statLine(7, "kubelet", 4711), stat{"kubelet", 4711}, true},
		{statLine(7, "a) R 1 1 (b", 4711), stat{"a) R 1 1 (b", 4711}, true},
		{statLine(7, "", 18446744073709551615), stat{"", 18446744073709551615}, true},
		{"7 (x) S " + long + "9", stat{"x", 9}, true},
		{"7 (x) S " + long, stat{}, false},
		{"7 (x) S " + long + "nine", stat{}, false},
		{"7 x S " + long + "9", stat{}, false},
		{")(", stat{}, false},
		{"", stat{}, false},
	} {
		got, err := parseStat([]byte(tt.text))
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("parseStat(%q) = %+v, %v, want %+v, %v", tt.text, got, err, tt.want, tt.ok)
		}
	}
}

// FuzzCgroup: whatever a path says, a UID is 32 digits, an ID is 64, and a pod
// that is named is found again however it is put.
func FuzzCgroup(f *testing.F) {
	f.Add("0::/kubepods/burstable/pod" + uidA + "/" + idA + "\n")
	f.Add("0::/../crio-" + idA + "\n1:cpu:/\n")
	f.Add("0::/kubepods.slice/kubepods-pod0a1b2c3d_0000_4000_8000_00000000000a.slice:cri-containerd:" + idB)
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseCgroup(text)
		if err != nil {
			if c != (cgroup{}) {
				t.Fatalf("%+v with %v", c, err)
			}
			return
		}
		if c.pod != "" && (len(c.pod) != 32 || canonical(c.pod) != c.pod) {
			t.Fatalf("pod %q", c.pod)
		}
		if c.container != "" && len(c.container) != 64 {
			t.Fatalf("container %q", c.container)
		}
		if c.pod == "" {
			return
		}
		again, err := parseCgroup("0::/kubepods/pod" + c.pod + "/" + c.container + "\n" + text)
		if err != nil || again != c {
			t.Fatalf("%+v, once more %+v, %v", c, again, err)
		}
		if _, err := parseCgroup(text + "\n9:x:/pod" + strings.Repeat("f", 31) + string("01"[c.pod[31]&1]) + "\n"); err == nil && !strings.HasPrefix(c.pod, strings.Repeat("f", 31)) {
			t.Fatalf("two pods in %q were not noticed", text)
		}
	})
}

func FuzzStat(f *testing.F) {
	f.Add("kubelet", uint64(1), "")
	f.Add(") (", uint64(1<<63), "(")
	f.Fuzz(func(t *testing.T, name string, started uint64, rest string) {
		_, _ = parseStat([]byte(rest))
		got, err := parseStat([]byte(statLine(1, name, started)))
		if err != nil || got != (stat{name, started}) {
			t.Fatalf("%q, %d became %+v, %v", name, started, got, err)
		}
	})
}

func FuzzDiag(f *testing.F) {
	f.Add(make([]byte, diagMsgLen))
	f.Add(append([]byte{2, 1}, make([]byte, diagMsgLen)...))
	f.Fuzz(func(t *testing.T, m []byte) {
		s, err := parseDiag(m)
		if err == nil && (!s.local.Addr().IsValid() || !s.remote.Addr().IsValid()) {
			t.Fatalf("%+v", s)
		}
	})
}
