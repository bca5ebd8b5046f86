package podnet

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
)

// A container that is not privileged sees its /proc/sys read-only.
func TestSysctlsAreWrittenThroughAReadOnlyProc(t *testing.T) {
	if m, err := os.ReadFile("/proc/self/uid_map"); err != nil || strings.Join(strings.Fields(string(m)), " ") != "0 0 4294967295" {
		t.Skip("a user namespace may not mount proc in a PID namespace that is not its own")
	}
	pod, other := netnstest.New(t, "pod"), netnstest.New(t, "other")
	pod.SetSysctl(earlyDemux, "1")
	other.SetSysctl(earlyDemux, "1")
	var direct, written error
	var read string
	onOwnThread(func() {
		if err := readOnlySysctls(); err != nil {
			direct = err
			return
		}
		if err := unix.Setns(int(pod.File().Fd()), unix.CLONE_NEWNET); err != nil {
			direct = err
			return
		}
		direct = os.WriteFile("/proc/sys/"+earlyDemux, []byte("0"), 0)
		s, done := procSys()
		defer done()
		written = s.write(earlyDemux, "0")
		read, _ = s.read(earlyDemux)
	})
	if !errors.Is(direct, unix.EROFS) {
		t.Fatalf("/proc/sys is not read-only: %v", direct)
	}
	if written != nil || read != "0" {
		t.Errorf("write: %v; it reads %q, want 0", written, read)
	}
	if got := pod.Sysctl(earlyDemux); got != "0" {
		t.Errorf("the pod has %s, want 0", got)
	}
	if got := other.Sysctl(earlyDemux); got != "1" {
		t.Errorf("another namespace has %s, want 1", got)
	}
}

// onOwnThread runs f on a thread that ends with it.
func onOwnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() { // The first thread would stay.
			onOwnThread(f)
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
	<-done
}

// readOnlySysctls gives this thread a mount namespace like a container's.
func readOnlySysctls() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}
