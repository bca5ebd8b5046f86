package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Lab is a handle on a lab that runs. It is safe for concurrent use.
type Lab struct {
	name     string
	lifeline *os.File      // Of an attached lab.
	gone     chan struct{} // Of an attached lab: its processes have ended.
}

// Open returns the handle of the user's lab of that name, DefaultName if it is
// empty. Nothing is asked of it yet.
func Open(name string) (*Lab, error) {
	o := Options{Name: name, Dir: "/"}
	if o.Name == "" {
		o.Name = DefaultName
	}
	if !validName.MatchString(o.Name) {
		return nil, fmt.Errorf("lab: %q is no name of a lab", name)
	}
	return &Lab{name: o.Name}, nil
}

// Stdio are the files that a command in a pod gets. Nil: /dev/null.
type Stdio struct{ In, Out, Err *os.File }

// files returns three files to send along; opened are those to be closed.
func (s Stdio) files() (all, opened []*os.File, err error) {
	for _, f := range []*os.File{s.In, s.Out, s.Err} {
		if f == nil {
			f, err = os.OpenFile(os.DevNull, os.O_RDWR, 0)
			if err != nil {
				closeAll(opened)
				return nil, nil, fmt.Errorf("lab: %w", err)
			}
			opened = append(opened, f)
		}
		all = append(all, f)
	}
	return all, opened, nil
}

// Exec runs a command in a pod (NAMESPACE/NAME[/CONTAINER], or NAME where it
// is the only one), or in the network namespace of node/NAME, control or
// fabric. It returns the command's exit code. When ctx ends the command is
// killed.
func (l *Lab) Exec(ctx context.Context, target string, argv []string, stdio Stdio) (int, error) {
	r, err := l.ask(ctx, request{Op: "exec", Target: target, Argv: argv}, stdio)
	return r.Code, err
}

// Logs writes what processes said to out: one process, a pod's, or all.
func (l *Lab) Logs(ctx context.Context, target string, follow bool, out *os.File) error {
	_, err := l.ask(ctx, request{Op: "logs", Target: target, Follow: follow}, Stdio{Out: out})
	return err
}

// Status describes the lab.
func (l *Lab) Status(ctx context.Context) (*Status, error) {
	// Through a pipe: a thousand pods do not fit into a packet.
	from, to, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	defer from.Close()
	status := &Status{}
	decoded := make(chan error, 1)
	go func() { decoded <- json.NewDecoder(from).Decode(status) }()
	_, err = l.ask(ctx, request{Op: "status"}, Stdio{Out: to})
	to.Close()
	if err != nil {
		return nil, err
	}
	if err := <-decoded; err != nil {
		return nil, fmt.Errorf("lab: status: %w", err)
	}
	return status, nil
}

// Kill sends a signal to a process (proxy/NODE, attach/NODE, control) or a
// pod's processes. With hold they are not started again until Release.
func (l *Lab) Kill(ctx context.Context, target string, sig syscall.Signal, hold bool) error {
	_, err := l.ask(ctx, request{Op: "kill", Target: target, Signal: int(sig), Hold: hold}, Stdio{})
	return err
}

// Release starts processes that were held, or had ended.
func (l *Lab) Release(ctx context.Context, target string) error {
	_, err := l.ask(ctx, request{Op: "start", Target: target}, Stdio{})
	return err
}

// Down ends the lab and returns when nothing of it is left.
func (l *Lab) Down(ctx context.Context) error {
	if _, err := l.ask(ctx, request{Op: "down"}, Stdio{}); err != nil && !errors.Is(err, errEnded) {
		return err
	}
	if l.gone != nil {
		defer l.lifeline.Close()
		select {
		case <-l.gone:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("lab: down: %w", context.Cause(ctx))
		}
	}
	for {
		conn, err := l.dial(ctx)
		if errors.Is(err, ErrNotUp) {
			return nil
		}
		if err != nil {
			return err
		}
		conn.Close()
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("lab: down: %w", context.Cause(ctx))
		}
	}
}

// ErrNotUp matches the errors of a lab that does not run.
var ErrNotUp = errors.New("is not up (ztun lab up starts it)")

// errEnded matches the errors of a lab that ended while it was asked.
var errEnded = errors.New("the lab has ended")

func (l *Lab) dial(ctx context.Context) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", socketAddress(l.name))
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("lab: %q %w", l.name, ErrNotUp)
	}
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	return conn.(*net.UnixConn), nil
}

// ask sends a request and waits for its reply, passing signals on.
func (l *Lab) ask(ctx context.Context, r request, stdio Stdio) (reply, error) {
	conn, err := l.dial(ctx)
	if err != nil {
		return reply{}, err
	}
	defer conn.Close()
	// An abstract address is anybody's: make sure that it is ours.
	if err := ownedByUs(conn); err != nil {
		return reply{}, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	files, opened, err := stdio.files()
	if err != nil {
		return reply{}, err
	}
	defer closeAll(opened)
	if err := send(conn, r, files...); err != nil {
		return reply{}, fmt.Errorf("%w (%w)", errEnded, err)
	}
	if r.Op == "exec" {
		signals := make(chan os.Signal, 4)
		signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
		done := make(chan struct{})
		defer close(done)
		defer signal.Stop(signals)
		go func() {
			for {
				select {
				case s := <-signals:
					send(conn, signalling{Signal: int(s.(syscall.Signal))})
				case <-done:
					return
				}
			}
		}()
	}
	var answer reply
	received, err := receive(conn, &answer)
	closeAll(received)
	if ctx.Err() != nil {
		return reply{}, fmt.Errorf("lab: %s: %w", r.Op, context.Cause(ctx))
	}
	if err != nil {
		return reply{}, fmt.Errorf("lab: %s: %w (%w)", r.Op, errEnded, err)
	}
	if answer.Error != "" {
		return answer, errors.New(answer.Error)
	}
	return answer, nil
}

// ownedByUs says whether the far end was made by the same user, or root.
func ownedByUs(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("lab: control socket: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("lab: control socket: %w", err)
	}
	if int(cred.Uid) != os.Getuid() {
		return errors.New("lab: the control socket is another user's")
	}
	return nil
}
