package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// aRun is the inside of a run with one node, and a daemon in the node's cgroup. It never ends.
func aRun(p Prepared) error {
	if _, err := startNode(nodeConfig{Prepared: p, Name: "node1"}); err != nil {
		return err
	}
	cgroup := fmt.Sprintf("%s%d-node1", cgroupPrefix, p.Owner)
	if err := makeCgroup(cgroup); err != nil {
		return err
	}
	daemon := exec.Command("sleep", "infinity")
	daemon.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := daemon.Start(); err != nil {
		return err
	}
	for _, h := range hierarchies() {
		if err := os.WriteFile(filepath.Join(h, cgroup, "cgroup.procs"), []byte(strconv.Itoa(daemon.Process.Pid)), 0); err != nil {
			return err
		}
	}
	fmt.Println("runs")
	select {}
}

// begin starts a run, and returns its outer process once it is inside of everything that it makes.
func begin(t *testing.T) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		const why = "namespaces, mounts and cgroups of a node need root"
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	p := Prepared{Debian: t.TempDir(), LogDir: t.TempDir()}
	for _, plugin := range plugins {
		path := filepath.Join(p.Debian, "usr/lib/cni", plugin)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), outerVar+"="+string(text))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	if lines := bufio.NewScanner(out); !lines.Scan() || lines.Text() != "runs" {
		t.Fatalf("the run said %q and ended", lines.Text())
	}
	return cmd
}

// A trace is what a run has on the machine.
type trace struct {
	pids       []int
	namespaces map[string]bool // such as net:[4026531840], only the run's own
}

// traceOf finds the processes that the outer process started, in whatever session or namespace they are.
func traceOf(t *testing.T, outer int) trace {
	t.Helper()
	marked := regexp.MustCompile(fmt.Sprintf(`"Owner":%d\b`, outer))
	found := trace{namespaces: map[string]bool{}}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		env, err := os.ReadFile(filepath.Join(dir, "environ"))
		if err != nil || !marked.Match(env) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		found.pids = append(found.pids, pid)
		for _, kind := range []string{"net", "mnt", "pid"} {
			own, err := os.Readlink("/proc/self/ns/" + kind)
			if err != nil {
				t.Fatal(err)
			}
			if ns, err := os.Readlink(filepath.Join(dir, "ns", kind)); err == nil && ns != own {
				found.namespaces[ns] = true
			}
		}
	}
	return found
}

// wantGone waits until nothing of a run is left on the machine.
func wantGone(t *testing.T, outer int, before trace) {
	t.Helper()
	left := func() error {
		if now := traceOf(t, outer); len(now.pids) > 0 {
			return fmt.Errorf("processes %v", now.pids)
		}
		if groups := leftCgroups(outer); len(groups) > 0 {
			return fmt.Errorf("cgroups %v", groups)
		}
		links, err := filepath.Glob("/proc/[0-9]*/ns/*")
		if err != nil {
			return err
		}
		for _, link := range links {
			if ns, err := os.Readlink(link); err == nil && before.namespaces[ns] {
				return fmt.Errorf("%s is %s", link, ns)
			}
		}
		return nil
	}
	deadline := time.Now().Add(time.Minute)
	for err := left(); err != nil; err = left() {
		if time.Now().After(deadline) {
			t.Fatalf("left of the run: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " "+workDir+"/node1") || strings.Contains(line, "upperdir="+workDir) {
			t.Errorf("a mount is left: %s", line)
		}
	}
	if _, err := os.Stat(filepath.Join(workDir, "node1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory is left in %s: %v", workDir, err)
	}
}

func TestNothingIsLeftOfARun(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(signal.String(), func(t *testing.T) {
			cmd := begin(t)
			before := traceOf(t, cmd.Process.Pid)
			// sweeper, init, inside, machine, node, daemon; outer's environment has no owner yet.
			if len(before.pids) != 6 || len(before.namespaces) != 6 {
				t.Errorf("the run has processes %v and namespaces %v, want 6 of each", before.pids, before.namespaces)
			}
			if n := len(leftCgroups(cmd.Process.Pid)); n != len(hierarchies()) {
				t.Errorf("the run has %d cgroups, want %d", n, len(hierarchies()))
			}
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			wantGone(t, cmd.Process.Pid, before)
		})
	}
}
