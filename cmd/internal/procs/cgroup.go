package procs

import (
	"errors"
	"strings"
)

// A cgroup says what a process is in. Zero: nothing of Kubernetes.
type cgroup struct {
	// pod is the pod's UID in canonical form. "" where the runtime names only
	// the container.
	pod string
	// container is the ID of the container, if the pod's cgroup is not the
	// process' own.
	container string
}

func (c cgroup) isPod() bool { return c.pod != "" || c.container != "" }

var (
	errManyPods       = errors.New("procs: cgroups name several pods")
	errManyContainers = errors.New("procs: cgroups name several containers")
)

// parseCgroup reads /proc/PID/cgroup, of either version of cgroups, a line a
// hierarchy: "4:memory:/kubepods/burstable/pod<UID>/<container>". It knows the
// paths that both of the kubelet's drivers make, with whatever is before them:
//
//	cgroupfs   /kubepods/besteffort/pod<UID>/<container>
//	systemd    /kubepods.slice/kubepods-pod<UID_>.slice/cri-containerd-<container>.scope
//	           /system.slice/containerd.service/kubepods-pod<UID_>.slice:cri-containerd:<container>
//	CRI-O      /.../kubepods-pod<UID_>.slice/crio-<container>.scope[/container]
//	KubeEdge   /.../crio-<container>, where nothing names the pod
//
// and the relative ones ("/../...") that are seen from a cgroup namespace. What
// names two pods, or two containers, is an error: a process that can make cgroups below
// its own can name what it likes, but cannot hide where it is.
func parseCgroup(text string) (cgroup, error) {
	var all cgroup
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		_, rest, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		_, path, ok := strings.Cut(rest, ":")
		if !ok {
			continue
		}
		c, err := parsePath(path)
		if err != nil {
			return cgroup{}, err
		}
		switch {
		case c.pod != "" && all.pod != "" && c.pod != all.pod:
			return cgroup{}, errManyPods
		case c.container != "" && all.container != "" && c.container != all.container:
			return cgroup{}, errManyContainers
		}
		if c.pod != "" {
			all.pod = c.pod
		}
		if c.container != "" {
			all.container = c.container
		}
	}
	return all, nil
}

// parsePath reads the path of one hierarchy.
func parsePath(path string) (cgroup, error) {
	var c cgroup
	for part := range strings.FieldsFuncSeq(path, func(r rune) bool { return r == '/' || r == ':' }) {
		if uid := podOf(part); uid != "" {
			if c.pod != "" && c.pod != uid {
				return cgroup{}, errManyPods
			}
			// What stood before was around the pod: a node in a container.
			c.pod, c.container = uid, ""
			continue
		}
		id := containerOf(part, c.pod != "")
		switch {
		case id == "":
		case c.container == "":
			c.container = id
		case c.pod == "" && c.container != id:
			return cgroup{}, errManyContainers // Which is the pod's?
		} // Else a container in the pod's container.
	}
	return c, nil
}

// podOf returns the UID of a pod's cgroup, canonical, or "".
func podOf(part string) string {
	part = strings.TrimSuffix(part, ".slice")
	if i := strings.LastIndex(part, "-pod"); i >= 0 && !strings.HasPrefix(part, "pod") {
		part = part[i+1:]
	}
	uid, ok := strings.CutPrefix(part, "pod")
	if !ok {
		return ""
	}
	return canonical(uid)
}

// canonical returns the 32 digits of a UID, in whichever way it is written
// (systemd does not take its dashes, static pods have none), or "".
func canonical(uid string) string {
	groups := [...]int{8, 12, 16, 20} // Digits before each dash.
	out := make([]byte, 0, 32)
	dashes := 0
	for i := range len(uid) {
		c := uid[i]
		switch {
		case c == '-' || c == '_':
			if dashes == len(groups) || len(out) != groups[dashes] {
				return ""
			}
			dashes++
			continue
		case '0' <= c && c <= '9', 'a' <= c && c <= 'f':
		case 'A' <= c && c <= 'F':
			c += 'a' - 'A'
		default:
			return ""
		}
		if len(out) == cap(out) {
			return ""
		}
		out = append(out, c)
	}
	if len(out) != cap(out) || dashes != 0 && dashes != len(groups) {
		return ""
	}
	return string(out)
}

// containerOf returns the ID in the name of a container's cgroup, or "". Inside of
// a pod's cgroup the bare ID is enough, elsewhere a runtime must be named:
// plain numbers in hexadecimal are everywhere.
func containerOf(part string, inPod bool) string {
	part, scope := strings.CutSuffix(part, ".scope")
	runtime, id := "", part
	if i := strings.LastIndexByte(part, '-'); i >= 0 {
		runtime, id = part[:i], part[i+1:]
	}
	if len(id) != 64 || strings.Trim(id, "0123456789abcdef") != "" {
		return ""
	}
	switch {
	case runtime == "crio", inPod, scope && runtime == "cri-containerd":
		return id
	}
	return ""
}
