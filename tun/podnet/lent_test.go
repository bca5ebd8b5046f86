package podnet

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCheckFiles(t *testing.T) {
	e, other := newEnv(t), newEnv(t)
	e.attach(Config{})
	other.attach(Config{})
	open := func(e *env) []*os.File {
		t.Helper()
		files, err := e.a.OpenICMP()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			for _, f := range files {
				_ = f.Close()
			}
		})
		return files
	}
	icmp, foreign := open(e), open(other)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	pair := []*os.File{os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")}
	defer pair[0].Close()
	defer pair[1].Close()
	st := e.a.State()
	for _, tt := range []struct {
		name   string
		device *os.File
		icmp   []*os.File
		want   string // Within the error; "": none.
	}{
		{"its own", e.dev.file, icmp, ""},
		{"no TUN device", null, nil, "no TUN device"},
		{"another pod's", other.dev.file, nil, "network namespace"},
		{"another pod's ICMP sockets", e.dev.file, foreign, "network namespace"},
		{"no socket", e.dev.file, []*os.File{null}, "no socket"},
		{"another socket", e.dev.file, pair[:1], "of type 1"},
	} {
		err := st.CheckFiles(tt.device, tt.icmp)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	st.Device = "ztun1"
	if err := st.CheckFiles(e.dev.file, nil); err == nil || !strings.Contains(err.Error(), "ztun0") {
		t.Errorf("another device: %v", err)
	}
}
