package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/lab"
	"github.com/ztun/ztun/cmd/internal/lab/demo"
	"github.com/ztun/ztun/cmd/internal/lab/echo"
	"github.com/ztun/ztun/cmd/internal/lab/wire"
)

// runHiddenLab runs what a lab starts itself with, and does not return then.
func runHiddenLab(args []string) {
	if len(args) > 2 && args[1] == "lab" && slices.Contains(lab.Hidden, args[2]) {
		os.Exit(lab.RunHidden(args[2], args[3:]))
	}
}

func newLabCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Run a mesh on this machine",
		Long: `Run a mesh on this machine: nodes and pods are network namespaces, containers
are processes, and each node has its own ztun-proxy. Ordinary users need user
namespaces and a /dev/net/tun that is open to them; what is missing is named.

Names: a pod is NAMESPACE/NAME, or NAME where it is the only one; the lab's own
processes are control, proxy/NODE and attach/NODE.`,
	}
	name := cmd.PersistentFlags().String("name", lab.DefaultName, "which lab, where there are several")
	cmd.AddCommand(
		newLabUpCommand(name), newLabExecCommand(name), newLabLogsCommand(name), newLabStatusCommand(name),
		newLabDownCommand(name), newLabKillCommand(name), newLabStartCommand(name),
		newLabDemoCommand(), newLabEchoCommand(), newLabCallCommand(), newLabTapCommand(),
	)
	return cmd
}

func newLabUpCommand(name *string) *cobra.Command {
	var o lab.Options
	cmd := &cobra.Command{
		Use:   "up -f DIR",
		Short: "Start the lab that a directory of YAML describes, and follow its changes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Name, o.Progress = *name, cmd.ErrOrStderr()
			l, err := lab.Start(cmd.Context(), o)
			if err != nil || !o.Attached {
				return err
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "the lab is up; Ctrl-C takes it down")
			<-cmd.Context().Done()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			return l.Down(ctx)
		},
	}
	cmd.Flags().StringVarP(&o.Dir, "filename", "f", "", "directory of Kubernetes and Istio YAML")
	cmd.Flags().BoolVar(&o.Attached, "attached", false, "stay, and take the lab down at the end")
	cmd.Flags().StringVar(&o.Proxy, "proxy", "", "the ztun-proxy program (default: the one beside ztun)")
	cmd.MarkFlagRequired("filename")
	return cmd
}

func newLabExecCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "exec POD[/CONTAINER] -- COMMAND [ARG...]",
		Short: "Run a command in a pod, or in node/NAME, control or fabric",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			// Signals go to the command; this process ends with it.
			code, err := l.Exec(context.WithoutCancel(cmd.Context()), args[0], args[1:], lab.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
			if err != nil {
				return err
			}
			if code != 0 {
				return exitCode(code)
			}
			return nil
		},
	}
}

func newLabLogsCommand(name *string) *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:   "logs [POD | PROCESS | NODE | lab]",
		Short: "Show what processes have said: one, a pod's, a node's, or all",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			err = l.Logs(cmd.Context(), strings.Join(args, ""), follow, os.Stdout)
			if follow && cmd.Context().Err() != nil {
				return nil
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what they say next")
	return cmd
}

func newLabStatusCommand(name *string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show nodes, pods, services and processes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			status, err := l.Status(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				out := json.NewEncoder(cmd.OutOrStdout())
				out.SetIndent("", "  ")
				return out.Encode(status)
			}
			return printStatus(cmd, status)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func printStatus(cmd *cobra.Command, s *lab.Status) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "lab %s, from %s\n", s.Name, s.Dir)
	if s.Problem != "" {
		fmt.Fprintf(w, "NOT IN FORCE: %s\n", s.Problem)
	}
	process := func(p lab.ProcessStatus) string {
		text := p.State
		if p.Starts > 1 {
			text += fmt.Sprintf(", started %d times", p.Starts)
		}
		if p.State != "running" && p.Exit != "" {
			text += " (" + p.Exit + ")"
		}
		return text
	}
	fmt.Fprintf(w, "\nPROCESS\tPID\tSTATE\n")
	all := []lab.ProcessStatus{s.Control}
	for _, n := range s.Nodes {
		all = append(all, n.Proxy, n.Attach)
	}
	for _, p := range s.Pods {
		all = append(all, p.Containers...)
	}
	for _, p := range all {
		fmt.Fprintf(w, "%s\t%d\t%s\n", p.Name, p.PID, process(p))
	}
	fmt.Fprintf(w, "\nPOD\tNODE\tADDRESSES\tMESH\n")
	for _, p := range s.Pods {
		mesh := "no"
		if p.Enrolled {
			mesh = p.Phase
		}
		if p.Error != "" {
			mesh += ": " + p.Error
		}
		fmt.Fprintf(w, "%s/%s\t%s\t%s\t%s\n", p.Namespace, p.Name, p.Node, join(p.Addresses), mesh)
	}
	fmt.Fprintf(w, "\nSERVICE\tADDRESSES\n")
	for _, svc := range s.Service {
		fmt.Fprintf(w, "%s\t%s\n", svc.Hostname, join(svc.Addresses))
	}
	return w.Flush()
}

func join(addrs []netip.Addr) string {
	var texts []string
	for _, a := range addrs {
		texts = append(texts, a.String())
	}
	return strings.Join(texts, ",")
}

func newLabDownCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "End the lab; nothing of it stays",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 30*time.Second)
			defer cancel()
			err = l.Down(ctx)
			if errors.Is(err, lab.ErrNotUp) {
				fmt.Fprintln(cmd.ErrOrStderr(), err)
				return nil
			}
			return err
		},
	}
}

func newLabKillCommand(name *string) *cobra.Command {
	var text string
	var hold bool
	cmd := &cobra.Command{
		Use:   "kill PROCESS | POD | NODE",
		Short: "Send a signal to processes; the lab starts them again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sig := unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(text), "SIG"))
			if sig == 0 {
				return fmt.Errorf("lab: %q is no signal", text)
			}
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			return l.Kill(cmd.Context(), args[0], sig, hold)
		},
	}
	cmd.Flags().StringVarP(&text, "signal", "s", "TERM", "which signal")
	cmd.Flags().BoolVar(&hold, "hold", false, "do not start them again until ztun lab start")
	return cmd
}

func newLabStartCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use:   "start PROCESS | POD | NODE",
		Short: "Start processes that kill --hold stopped, or that have ended",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := lab.Open(*name)
			if err != nil {
				return err
			}
			return l.Release(cmd.Context(), args[0])
		},
	}
}

func newLabDemoCommand() *cobra.Command {
	var o demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show a mesh of two nodes and check every claim; exit code 0 only if all hold",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Out = cmd.OutOrStdout()
			// Of its own, so that it can run beside other labs and other demos.
			o.Name = fmt.Sprintf("demo-%d", os.Getpid())
			return demo.Run(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.Proxy, "proxy", "", "the ztun-proxy program (default: the one beside ztun)")
	return cmd
}

func newLabTapCommand() *cobra.Command {
	var words []string
	cmd := &cobra.Command{
		Use:    "tap",
		Short:  "Count what goes by on the interfaces here: \"report\" or \"reset\" on standard input asks",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return wire.Listen(os.Stdin, cmd.OutOrStdout(), words)
		},
	}
	cmd.Flags().StringArrayVar(&words, "word", nil, "a text to look for")
	return cmd
}

func newLabEchoCommand() *cobra.Command {
	var c echo.Config
	cmd := &cobra.Command{
		Use:   "echo",
		Short: "A server that says who it is and whom it saw, for pods",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(c.HTTP)+len(c.TCP)+len(c.Banner) == 0 {
				return errors.New("echo: nothing to listen on: give --listen, --tcp or --banner")
			}
			c.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			return echo.Serve(cmd.Context(), c)
		},
	}
	cmd.Flags().StringSliceVar(&c.HTTP, "listen", nil, "answer HTTP on [ADDRESS]:PORT")
	cmd.Flags().StringSliceVar(&c.TCP, "tcp", nil, "send bytes back on [ADDRESS]:PORT")
	cmd.Flags().StringSliceVar(&c.Banner, "banner", nil, "the same, after a line of its own")
	return cmd
}

func newLabCallCommand() *cobra.Command {
	var c echo.Call
	cmd := &cobra.Command{
		Use:   "call http://HOST[:PORT][/PATH] | tcp://HOST:PORT",
		Short: "A client that says what happened, for pods; its exit code is the errno",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c.URL = args[0]
			err := echo.Do(cmd.Context(), c, cmd.OutOrStdout())
			if errno, name, ok := echo.Errno(err); ok && errno != syscall.Errno(0) {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: %v\n", name, err)
				return exitCode(errno)
			}
			return err
		},
	}
	cmd.Flags().IntVar(&c.Count, "count", 1, "how often")
	cmd.Flags().BoolVar(&c.Reuse, "reuse", false, "on one connection")
	cmd.Flags().StringVar(&c.Data, "data", "", "what to send")
	cmd.Flags().DurationVar(&c.Timeout, "timeout", 5*time.Second, "how long one call may take")
	return cmd
}
