package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A run is six kinds of process, all the same program:
//
//	outer    the caller's: builds, then starts init in new mount, pid and net namespaces
//	init     process 1 of those: reaps what daemons leave, dies with outer
//	inside   runs the cluster and the tests
//	machine  one for each node: process 1 of new mount, pid and net namespaces, reaps
//	node     started by machine: the node's mounts and network, then its daemons
//	sweeper  outside of the namespaces: waits for outer's end, then removes the cgroups
//
// When outer ends, whatever ended it, the kernel kills init, with it all
// processes, and with them mounts and networks. The sweeper does the rest.
const (
	roleVar   = "ZTUN_E2E_ROLE"
	configVar = "ZTUN_E2E_CONFIG"
)

// Role does the work of this process if it is one that the run itself started
// and not the one with the tests; it does not return then. inside says that
// the tests are to run here, with the returned preparation.
func Role() (p Prepared, inside bool) {
	// A user's path may lack them, and iptables with them.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	var err error
	switch os.Getenv(roleVar) {
	case "":
		return p, false
	case "init":
		err = initRole()
	case "sweeper":
		err = sweeperRole()
	case "machine":
		err = machineRole()
	case "node":
		err = nodeRole()
	case "inside":
		if err = json.Unmarshal([]byte(os.Getenv(configVar)), &p); err == nil {
			return p, true
		}
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: %s: %v\n", os.Getenv(roleVar), err)
		os.Exit(1)
	}
	os.Exit(0)
	return p, false
}

// again is this program with the same arguments in another role.
func again(role string, config any) (*exec.Cmd, error) {
	text, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleVar+"="+role, configVar+"="+string(text))
	return cmd, nil
}

// Enclose runs this program again inside namespaces of its own and returns its exit status.
func Enclose(p Prepared) (int, error) {
	p.Owner = os.Getpid()
	sweepCgroups(0)
	sweep, err := startSweeper(p)
	if err != nil {
		return 1, err
	}
	cmd, err := again("init", p)
	if err != nil {
		return 1, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL, // of the thread that starts it
	}
	runtime.LockOSThread()
	if err := cmd.Start(); err != nil {
		return 1, fmt.Errorf("e2e: new namespaces: %w", err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	go func() {
		for range signals {
			_ = cmd.Process.Kill()
		}
	}()
	err = cmd.Wait()
	if sweepErr := sweep(); sweepErr != nil {
		return 1, errors.Join(err, sweepErr)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if code := exit.ExitCode(); code > 0 {
			return code, nil
		}
		return 1, fmt.Errorf("e2e: the run was ended: %w", err)
	}
	return 0, err
}

// startSweeper starts the one that removes what the kernel leaves. It begins
// when this process ends, or when the returned function is called, which waits for it.
func startSweeper(p Prepared) (finish func() error, err error) {
	cmd, err := again("sweeper", p)
	if err != nil {
		return nil, err
	}
	cmd.Stderr = os.Stderr
	// What a terminal or a shell ends at once is not for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	begin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("e2e: sweeper: %w", err)
	}
	return func() error {
		begin.Close()
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("e2e: sweeper: %w", err)
		}
		return nil
	}, nil
}

func sweeperRole() error {
	var p Prepared
	if err := json.Unmarshal([]byte(os.Getenv(configVar)), &p); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	// Cgroups empty a little after the last process of a namespace is gone.
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		sweepCgroups(p.Owner)
		if len(leftCgroups(p.Owner)) == 0 {
			return nil
		}
	}
	return fmt.Errorf("cgroups are left: %v", leftCgroups(p.Owner))
}

// initRole is process 1 of the run.
func initRole() error {
	if err := ownMounts("tmpfs:/run", "tmpfs:"+workDir); err != nil {
		return err
	}
	return startAndReap("inside")
}

// machineRole makes a node's first process, as initRole does for the whole run.
func machineRole() error {
	if err := ownMounts(); err != nil {
		return err
	}
	return startAndReap("node")
}

// ownMounts parts this process's mounts from its parent's, then mounts /proc
// of its own processes and others, each kind:directory.
func ownMounts(others ...string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts of its own: %w", err)
	}
	for _, m := range append([]string{"proc:/proc"}, others...) {
		kind, to, _ := strings.Cut(m, ":")
		if err := unix.Mount(kind, to, kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", kind, to, err)
		}
	}
	return nil
}

// startAndReap goes on in another role with what this one was told, waits for
// every process that ends here, and ends as that one does.
func startAndReap(role string) error {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait: %w", err)
		}
		if pid == cmd.Process.Pid {
			if status.Signaled() {
				os.Exit(128 + int(status.Signal()))
			}
			os.Exit(status.ExitStatus())
		}
	}
}

func nodeAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET}
}

// Itself runs this program with other arguments and in no role, and returns what it printed.
func Itself(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVar+"=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return string(out), nil
}
