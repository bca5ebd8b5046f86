package lab

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// restartPolicy says when a process that ended is started again.
type restartPolicy string

const (
	restartAlways    restartPolicy = "Always"
	restartOnFailure restartPolicy = "OnFailure"
	restartNever     restartPolicy = "Never"
)

const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 10 * time.Second
	// A process that ran for so long starts again with the first back-off.
	provenAfter = 10 * time.Second
	// killGrace is what a process gets between SIGTERM and SIGKILL.
	killGrace = 2 * time.Second
)

// A process is a program that the lab keeps running.
type process struct {
	// Set before run, read-only after.
	name    string
	kind    string // control, proxy, attach or container.
	policy  restartPolicy
	space   *space
	command func() (*exec.Cmd, error)
	started func(pid int) // After each start. May be nil.
	gate    <-chan struct{}
	log     ring

	mu sync.Mutex
	// mu guards the fields below.
	pid      int
	starts   int
	exit     string // How it last ended.
	done     bool   // Ended, and the policy says that it stays so.
	held     bool   // Stopped by the user.
	changed  chan struct{}
	released chan struct{}
}

// ProcessStatus is a process as Status shows it.
type ProcessStatus struct {
	Name   string `json:"name"`
	Kind   string `json:"kind"`
	PID    int    `json:"pid,omitempty"`
	Starts int    `json:"starts"`
	State  string `json:"state"`
	Exit   string `json:"exit,omitempty"`
}

func (p *process) status() ProcessStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := ProcessStatus{Name: p.name, Kind: p.kind, PID: p.pid, Starts: p.starts, Exit: p.exit}
	switch {
	case p.pid != 0:
		s.State = "running"
	case p.held:
		s.State = "stopped"
	case p.done:
		s.State = "ended"
	case p.starts == 0:
		s.State = "waiting"
	default:
		s.State = "restarting"
	}
	return s
}

// run keeps the process as its policy says until ctx ends; then it stops it.
func (p *process) run(ctx context.Context) {
	if p.gate != nil {
		select {
		case <-p.gate:
		case <-ctx.Done():
			return
		}
	}
	backoff := firstBackoff
	for ctx.Err() == nil {
		if release := p.heldUntil(); release != nil {
			select {
			case <-release:
			case <-ctx.Done():
			}
			backoff = firstBackoff
			continue
		}
		began := time.Now()
		err := p.once(ctx)
		if p.finish(err) {
			continue
		}
		if time.Since(began) > provenAfter {
			backoff = firstBackoff
		}
		select {
		case <-time.After(backoff):
		case <-ctx.Done():
		}
		backoff = min(2*backoff, lastBackoff)
	}
}

// once starts the process and waits for its end. Its error says how it ended.
func (p *process) once(ctx context.Context) error {
	cmd, err := p.command()
	if err != nil {
		return err
	}
	if cmd.Stdout == nil {
		cmd.Stdout, cmd.Stderr = &p.log, &p.log
	}
	cmd.WaitDelay = time.Second
	if err := p.space.start(cmd); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	p.mu.Lock()
	p.pid = cmd.Process.Pid
	p.starts++
	p.mu.Unlock()
	p.notify()
	if p.started != nil {
		p.started(cmd.Process.Pid)
	}
	ended := make(chan struct{})
	go func() {
		select {
		case <-ended:
			return
		case <-ctx.Done():
		}
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(killGrace):
			cmd.Process.Kill()
		}
	}()
	err = cmd.Wait()
	close(ended)
	return err
}

// finish records an end, and says whether there is no back-off to wait for:
// the process is held, or done.
func (p *process) finish(err error) bool {
	p.mu.Lock()
	p.pid = 0
	p.exit = "exit status 0"
	if err != nil {
		p.exit = err.Error()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			fmt.Fprintf(&p.log, "lab: %s: %v\n", p.name, err)
		}
	}
	stays := p.policy == restartNever || p.policy == restartOnFailure && err == nil
	if stays && !p.held {
		p.done = true
	}
	over := p.held || p.done
	p.mu.Unlock()
	p.notify()
	return over
}

// heldUntil returns nil when the process may run, else a channel that is
// closed when that may have changed.
func (p *process) heldUntil() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.held && !p.done {
		return nil
	}
	if p.released == nil {
		p.released = make(chan struct{})
	}
	return p.released
}

// kill sends a signal. With hold the process is not started again until
// release.
func (p *process) kill(sig syscall.Signal, hold bool) error {
	p.mu.Lock()
	p.held = p.held || hold
	pid := p.pid
	p.mu.Unlock()
	if pid == 0 {
		if hold {
			return nil
		}
		return fmt.Errorf("lab: %s is not running", p.name)
	}
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("lab: kill %s: %w", p.name, err)
	}
	return nil
}

// release lets a held or ended process start.
func (p *process) release() {
	p.mu.Lock()
	p.held, p.done = false, false
	if p.released != nil {
		close(p.released)
		p.released = nil
	}
	p.mu.Unlock()
}

// await returns once cond holds of the status, or with ctx's cause.
func (p *process) await(ctx context.Context, cond func(ProcessStatus) bool) error {
	for {
		p.mu.Lock()
		if p.changed == nil {
			p.changed = make(chan struct{})
		}
		changed := p.changed
		p.mu.Unlock()
		s := p.status()
		if cond(s) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("lab: %s is %s (%s): %w", p.name, s.State, s.Exit, context.Cause(ctx))
		}
	}
}

func (p *process) notify() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}
