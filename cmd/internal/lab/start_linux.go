package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// startTimeout bounds how long a lab may take until every pod is up.
const startTimeout = 60 * time.Second

// maxOrder bounds the instructions, which are an argument, in bytes.
const maxOrder = 100 << 10

// Descriptors that init and supervise find open.
const (
	lifelineFD = 3 // Ends with the starter; one byte from it says that it need not.
	progressFD = 4 // Takes reports for the starter.
	listenerFD = 5 // The control socket.
)

// A report is a line of what a starting lab tells its starter.
type report struct {
	Line  string `json:"line,omitempty"`
	Ready bool   `json:"ready,omitempty"`
	Error string `json:"error,omitempty"`
}

// instructions are what supervise is started with, as JSON in its argument.
type instructions struct {
	Name string `json:"name"`
	Dir  string `json:"dir"`
	// Files are written to Dir first, which is then the lab's own.
	Files      map[string]string `json:"files,omitempty"`
	Program    string            `json:"program"`
	Proxy      string            `json:"proxy"`
	Privileged bool              `json:"privileged"` // No user namespace around it.
	Users      bool              `json:"users"`      // There are other users than the lab's own.
	// Nodes are as in Options.
	Nodes map[string]NodePrograms `json:"nodes,omitempty"`
}

// Start starts a lab and returns once every pod has been started. A lab that
// does not come up is taken down again.
func Start(ctx context.Context, o Options) (*Lab, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	if err := CheckMachine(); err != nil {
		return nil, err
	}
	listener, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socketAddress(o.Name), Net: "unixpacket"})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("lab: %q is up already (ztun lab down takes it down)", o.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("lab: control socket: %w", err)
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	l, err := launch(ctx, o, listener)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// launch starts init and follows its reports until the lab is up.
func launch(ctx context.Context, o Options, listener *net.UnixListener) (_ *Lab, err error) {
	order := instructions{Name: o.Name, Dir: o.Dir, Files: o.Files, Program: o.Program, Proxy: o.Proxy, Privileged: privileged(), Nodes: o.Nodes}
	order.Users = order.Privileged && manyUsers()
	text, err := json.Marshal(order)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if len(text) > maxOrder {
		return nil, fmt.Errorf("lab: files: more than %d bytes", maxOrder)
	}
	socket, err := listener.File()
	if err != nil {
		return nil, fmt.Errorf("lab: control socket: %w", err)
	}
	defer socket.Close()
	lifelineRead, lifeline, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	defer lifelineRead.Close()
	reports, progress, err := os.Pipe()
	if err != nil {
		lifeline.Close()
		return nil, fmt.Errorf("lab: %w", err)
	}
	defer reports.Close()

	cmd := exec.Command(o.Program, "lab", "init", string(text))
	cmd.SysProcAttr = namespaces(order.Privileged)
	cmd.ExtraFiles = []*os.File{lifelineRead, progress, socket}
	cmd.Dir = "/"
	cmd.Env = []string{}
	err = cmd.Start()
	progress.Close()
	if err != nil {
		lifeline.Close()
		return nil, fmt.Errorf("lab: make namespaces: %w", err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	defer func() {
		if err != nil {
			lifeline.Close()
			cmd.Process.Kill()
			<-done
		}
	}()
	stop := context.AfterFunc(ctx, func() { reports.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := follow(reports, o); err != nil {
		return nil, errors.Join(err, context.Cause(ctx))
	}
	l := &Lab{name: o.Name}
	if o.Attached {
		l.lifeline, l.gone = lifeline, done
		return l, nil
	}
	if _, err := lifeline.Write([]byte{1}); err != nil {
		return nil, fmt.Errorf("lab: let go: %w", err)
	}
	return l, lifeline.Close()
}

// follow prints reports until one says that the lab is ready.
func follow(reports *os.File, o Options) error {
	lines := bufio.NewScanner(reports)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r report
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return fmt.Errorf("lab: start: unexpected report %q", lines.Text())
		}
		switch {
		case r.Error != "":
			return errors.New(r.Error)
		case r.Ready:
			return nil
		default:
			fmt.Fprintln(o.Progress, r.Line)
		}
	}
	if err := lines.Err(); errors.Is(err, os.ErrDeadlineExceeded) {
		return errors.New("lab: did not come up in time")
	}
	return errors.New("lab: ended while it was coming up")
}
