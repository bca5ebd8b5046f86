package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/ztun/ztun/cmd/internal/lab"
)

// A site is where the bench measures: a *lab.Lab, or a stand-in for one.
type site interface {
	Exec(ctx context.Context, target string, argv []string, stdio lab.Stdio) (int, error)
	Status(ctx context.Context) (*lab.Status, error)
	Kill(ctx context.Context, target string, sig syscall.Signal, hold bool) error
}

// An agent is a worker as the bench sees it: a process somewhere in the lab
// that does what it is told. It is not safe for concurrent use.
type agent struct {
	where   string
	pid     int // In the lab's PID namespace.
	orders  *os.File
	answers *os.File
	lines   *bufio.Reader
	ended   chan error
}

// endTimeout bounds how long an agent may take to leave.
const endTimeout = 5 * time.Second

// startAgent starts a worker in a pod, or wherever Exec of the lab reaches.
func startAgent(ctx context.Context, s site, program, where string) (*agent, error) {
	stdin, orders, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("bench: %w", err)
	}
	answers, stdout, err := os.Pipe()
	if err != nil {
		stdin.Close()
		orders.Close()
		return nil, fmt.Errorf("bench: %w", err)
	}
	a := &agent{where: where, orders: orders, answers: answers, lines: bufio.NewReader(answers), ended: make(chan error, 1)}
	go func() {
		code, err := s.Exec(ctx, where, []string{program, "worker"}, lab.Stdio{In: stdin, Out: stdout, Err: os.Stderr})
		if err == nil && code != 0 {
			err = fmt.Errorf("bench: worker in %s: exit code %d", where, code)
		}
		a.ended <- err
		stdin.Close()
		stdout.Close()
	}()
	hello, err := a.ask(ctx, order{Do: "hello"}, connectTimeout)
	if err != nil {
		return nil, errors.Join(err, a.end())
	}
	a.pid = hello.PID
	return a, nil
}

// ask gives an order and waits for the answer, for so long at most.
func (a *agent) ask(ctx context.Context, o order, patience time.Duration) (answer, error) {
	if err := a.answers.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return answer{}, fmt.Errorf("bench: %s: %w", a.where, err)
	}
	stop := context.AfterFunc(ctx, func() { a.answers.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := json.NewEncoder(a.orders).Encode(o); err != nil {
		return answer{}, fmt.Errorf("bench: %s: %s: %w", a.where, o.Do, err)
	}
	line, err := a.lines.ReadBytes('\n')
	if ctx.Err() != nil {
		return answer{}, fmt.Errorf("bench: %s: %s: %w", a.where, o.Do, context.Cause(ctx))
	}
	if err != nil {
		select {
		case end := <-a.ended:
			a.ended <- end
			err = errors.Join(err, end)
		default:
		}
		return answer{}, fmt.Errorf("bench: %s: no answer to %s: %w", a.where, o.Do, err)
	}
	var got answer
	if err := json.Unmarshal(line, &got); err != nil {
		return answer{}, fmt.Errorf("bench: %s: answer to %s: %w", a.where, o.Do, err)
	}
	if got.Error != "" {
		return answer{}, fmt.Errorf("%s: %s", a.where, got.Error)
	}
	return got, nil
}

// end makes the worker leave and waits for it.
func (a *agent) end() error {
	err := errors.Join(a.orders.Close())
	select {
	case end := <-a.ended:
		a.ended <- end
		err = errors.Join(err, end)
	case <-time.After(endTimeout):
		err = errors.Join(err, fmt.Errorf("bench: worker in %s does not end", a.where))
	}
	return errors.Join(err, a.answers.Close())
}
