// App is what the tests run in pods: servers of every kind that a probe or a
// mesh cares about, and the clients that count exactly what failed. It is also
// the image of the pods' sandboxes. Clients print one line of JSON.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const usage = `usage: app COMMAND [FLAG...] [ARG...]

  pause              reap children until SIGTERM
  serve              all servers, see serve.go
  get URL            one HTTP request
  tcp ADDRESS        connect, print what the server says first
  grpc ADDRESS       ask gRPC's health service
  echo ADDRESS       one long connection: send, compare hashes, until -for ends
  load URL           requests at -rate for -for, each failure counted
  sleep DURATION     then exit, as a Job does
`

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "app: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, command string, args []string) error {
	flags := flag.NewFlagSet(command, flag.ExitOnError)
	var (
		lasts   = flags.Duration("for", 10*time.Second, "how long")
		rate    = flags.Int("rate", 20, "requests a second")
		keep    = flags.Bool("keep", false, "reuse connections")
		timeout = flags.Duration("timeout", 5*time.Second, "of one attempt")
		source  = flags.Int("source-port", 0, "dial from this port")
	)
	if err := flags.Parse(args); err != nil {
		return err
	}
	arg := flags.Arg(0)
	switch command {
	case "pause":
		return pause(ctx)
	case "serve":
		return serve(ctx)
	case "get":
		return show(get(ctx, arg, *timeout))
	case "tcp":
		return show(banner(ctx, arg, *timeout, *source))
	case "grpc":
		return show(health(ctx, arg, *timeout))
	case "echo":
		return show(echo(ctx, arg, *source, *lasts, *timeout))
	case "load":
		return show(load(ctx, arg, loadConfig{Rate: *rate, For: *lasts, Keep: *keep, Timeout: *timeout}))
	case "sleep":
		d, err := time.ParseDuration(arg)
		if err != nil {
			return err
		}
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
		return nil
	}
	return errors.New("unknown command " + strconv.Quote(command))
}

// show prints a result as one line of JSON; what failed is in the result.
func show(result any) error { return json.NewEncoder(os.Stdout).Encode(result) }

// pause is process 1 of a pod's sandbox: orphans end here.
func pause(ctx context.Context) error {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-children:
			for {
				if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 && err != unix.EINTR {
					break
				}
			}
		}
	}
}
