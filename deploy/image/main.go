package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		stop()
		os.Exit(1)
	}
}

// Options say what to build.
type Options struct {
	Source  string    // The root of the product's module.
	Out     string    // The directory for what is written; made if missing.
	Name    string    // Of the image, without a tag.
	Version string    // The tag, and what the programs say of themselves.
	Arches  []string  // GOARCH values.
	Epoch   time.Time // The time of every file.
}

func run(ctx context.Context, args []string, out io.Writer) error {
	o := Options{Epoch: time.Unix(0, 0)}
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.StringVar(&o.Source, "source", ".", "root of the product's module")
	flags.StringVar(&o.Out, "out", "bin/image", "directory for what is written")
	flags.StringVar(&o.Name, "name", "ztun", "name of the image, without a tag")
	flags.StringVar(&o.Version, "version", "devel", "tag of the image")
	arches := flags.String("arch", "amd64,arm64", "architectures, by Go's names")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	o.Arches = strings.Split(*arches, ",")
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < 0 {
			return fmt.Errorf("SOURCE_DATE_EPOCH: %q is not a number of seconds since 1970", s)
		}
		o.Epoch = time.Unix(n, 0)
	}
	written, err := Build(ctx, o)
	for _, path := range written {
		fmt.Fprintln(out, path)
	}
	return err
}

// validate says everything that is wrong with o.
func (o *Options) validate() error {
	var errs []error
	if _, err := o.tag(); err != nil {
		errs = append(errs, err)
	}
	seen := map[string]bool{}
	for _, arch := range o.Arches {
		switch {
		case arch != "amd64" && arch != "arm64":
			errs = append(errs, fmt.Errorf("architecture %q is neither amd64 nor arm64", arch))
		case seen[arch]:
			errs = append(errs, fmt.Errorf("architecture %s is named twice", arch))
		}
		seen[arch] = true
	}
	return errors.Join(errs...)
}

// tag is the image's name with its tag.
func (o *Options) tag() (name.Tag, error) {
	tag, err := name.NewTag(o.Name + ":" + o.Version)
	if err != nil {
		return name.Tag{}, fmt.Errorf("name of the image: %w", err)
	}
	return tag, nil
}
